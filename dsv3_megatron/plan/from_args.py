"""From validated arguments to a `Job`: every argument that a step's time or memory depends on."""

from argparse import Namespace
from typing import Any

from dsv3_megatron.dualpipe.arguments import given_options
from dsv3_megatron.fp8.precision import recipe_of
from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.pipeline.build import INTERLEAVED
from dsv3_megatron.pipeline.traits import TRAITS
from dsv3_megatron.plan import unplanned
from dsv3_megatron.plan.activations_te import OFFLOADED
from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.destinations import most_imbalance
from dsv3_megatron.plan.hardware import Gpu, gpu_named
from dsv3_megatron.plan.job import Job, Layout, PlanError, Precision, Software, Stage, megatrons_schedule
from dsv3_megatron.plan.launch import VOCABULARY, Launched, refuse_attention, refuse_fsdp

# Megatron's parts of a layer that are CUDA graphs, and ours; the router's graph has the shared expert in it.
_GRAPHS = {
    "attn": ("attn",),
    "mlp": ("mlp",),
    "moe": ("moe",),
    "moe_router": ("router", "shared_experts"),
    "moe_preprocess": ("preprocess",),
}
_WHOLE_LAYER = ("attn", "mlp", "moe", "router", "preprocess", "shared_experts")


def job_of(found: Launched, padded_vocab_size: int, load_imbalance: float | None) -> Job:
    """The job of validated arguments.

    Args:
        padded_vocab_size: rows of the embedding that were counted.
        load_imbalance: tokens of the fullest expert-parallel rank against the mean; None for DeepSeek's, or 1 where the
            router forces an even load or one rank has all experts.

    Raises:
        PlanError: what the planner does not know, by its argument.
    """
    args, given, gpu = found.args, found.given, gpu_named(found.gpu)
    if load_imbalance is None:
        load_imbalance = (
            1.0 if args.moe_router_force_load_balancing else min(LOAD_IMBALANCE, _most_imbalance(args))
        )
    _refuse(args, load_imbalance)
    unplanned.refuse(args, gpu)
    stages = tuple(_stages(found))
    layout = _layout(found, len(stages))
    _refuse_spread(layout, args)
    sizes = sizes_of(found)
    if padded_vocab_size != sizes.padded_vocab_size:
        sizes = ModelSizes(**{**vars(sizes), "padded_vocab_size": padded_vocab_size})
    dispatcher = args.moe_token_dispatcher_type
    return Job(
        sizes=sizes,
        layout=layout,
        stages=stages,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        precision=_precision(args),
        recompute=_recompute(args),
        recompute_layers=_recomputed_layers(args),
        recompute_together=_recomputed_together(args),
        distributed_optimizer=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        transformer_impl=getattr(given, "transformer_impl", "transformer_engine"),
        dispatcher=dispatcher,
        dispatch_chunks=getattr(args, "moe_two_hop_chunks", None) or Job.dispatch_chunks,
        flex_backend=args.moe_flex_dispatcher_backend or "deepep",
        capacity_factor=args.moe_expert_capacity_factor if args.moe_pad_expert_input_to_capacity else None,
        moe_router_num_groups=args.moe_router_num_groups or 1,
        moe_router_group_topk=args.moe_router_group_topk or 1,
        load_imbalance=load_imbalance,
        balance_loss=bool(args.moe_aux_loss_coeff),
        shared_expert_overlap=bool(args.moe_shared_expert_overlap),
        communication_sms=_communication_sms(args, dispatcher, gpu),
        whole_iteration_graph=args.cuda_graph_impl == "full_iteration",
        software=_software(args),
        offload_optimizer=args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0,
        offload_modules=frozenset(args.offload_modules or ())
        if args.fine_grained_activation_offloading
        else frozenset(),
        nvlink_domain=_domain(found, gpu),
        unplanned=unplanned.unplanned(args),
    )


def _refuse(args: Namespace, load_imbalance: float) -> None:
    """What no plan can be made of."""
    if not args.global_batch_size:
        raise PlanError("global_batch_size is not set: give the number of sequences of a step")
    refuse_attention(args.multi_latent_attention)
    refuse_fsdp(args)
    if args.fine_grained_activation_offloading and "fused_group_mlp" in (args.offload_modules or ()):
        raise PlanError(
            f"offload_modules=fused_group_mlp: the planner knows {', '.join(OFFLOADED)}; use some of those"
        )
    most = _most_imbalance(args)
    if load_imbalance > most:
        raise PlanError(
            f"load_imbalance={load_imbalance:g}: with expert_model_parallel_size={args.expert_model_parallel_size} the "
            f"fullest rank has at most {most:g} times the mean; use a number from 1 to {most:g}"
        )


def _refuse_spread(layout: Layout, args: Namespace) -> None:
    """Experts that do not lie evenly over a stage's ranks; Megatron sees it when it makes its groups."""
    ranks, width = layout.num_gpus // layout.pp, args.moe_ffn_hidden_size or args.ffn_hidden_size
    sizes = f"expert_model_parallel_size={layout.ep}, expert_tensor_parallel_size={layout.etp}"
    if ranks % layout.expert_ranks:
        raise PlanError(
            f"{sizes}: the {ranks} ranks of a pipeline stage do not divide into groups of {layout.expert_ranks}; use "
            "sizes whose product divides them"
        )
    if layout.etp > 1 and width % layout.etp:
        raise PlanError(f"{sizes}: moe_ffn_hidden_size={width} does not divide; use a size that divides it")


def _most_imbalance(args: Namespace) -> float:
    if not args.num_experts:
        return 1.0
    ep = args.expert_model_parallel_size
    return most_imbalance(ep, args.num_experts // ep, args.moe_router_topk)


def sizes_of(found: Launched) -> ModelSizes:
    """Of the model; the vocabulary is padded as Megatron pads it."""
    args = found.args
    args.num_moe_experts = args.num_experts  # as Megatron's model configuration calls it
    vocabulary = args.padded_vocab_size
    if not vocabulary:
        step = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        vocabulary = -(-(args.vocab_size or VOCABULARY) // step) * step
    return ModelSizes.from_config(args, vocabulary, args.seq_length)


def _domain(found: Launched, gpu: Gpu) -> int | None:
    """Neighbouring ranks that share NVLink, where it is another number than the hardware table's: as
    `--nvlink-domain-size` says, or the ranks of a machine, where no switch reaches beyond one."""
    if found.per_node > gpu.node:
        raise PlanError(
            f"gpus_per_node={found.per_node}: a machine of {gpu.name} has {gpu.node}; use gpus_per_node={gpu.node} and "
            "more nodes"
        )
    ranks = gpu.nvlink_domain if gpu.nvlink_domain > gpu.node else min(found.per_node, gpu.nvlink_domain)
    domain = getattr(found.args, "nvlink_domain_size", None) or ranks
    return domain if domain != gpu.nvlink_domain else None


def _communication_sms(args: Namespace, dispatcher: str, gpu: Gpu) -> int | None:
    """As `--communication-sms` says; else None, DeepSeek's own way, where a schedule of ours runs."""
    said, name = getattr(args, "communication_sms", None), "communication_sms"
    if said is None and args.pipeline_schedule != "1f1b":
        return None
    if said is None and dispatcher == "flex":
        hybrid = args.moe_flex_dispatcher_backend == "hybridep"
        name = "moe_hybridep_num_sms" if hybrid else "moe_deepep_num_sms"
        if args.moe_flex_dispatcher_num_sms:
            name = "moe_flex_dispatcher_num_sms"
        said = getattr(args, name) or (32 if hybrid else 20)
    if said is not None and said >= gpu.sms:
        raise PlanError(f"{name}={said}: {gpu.name} has {gpu.sms}, and computation needs some; use fewer")
    return 20 if said is None else said


def _software(args: Namespace) -> Software:
    if args.pipeline_schedule != "1f1b":
        return Software(own_kernels=True)  # DeepSeek's schedule, which is calibrated with DeepSeek's kernels
    loss = ""
    if args.cross_entropy_loss_fusion:
        loss = "te" if args.cross_entropy_fusion_impl == "te" else "native"
    graphs: set[str] = set()
    if args.cuda_graph_impl in ("local", "transformer_engine"):
        names = [getattr(part, "name", str(part)) for part in args.cuda_graph_modules or ()]
        for name in names:
            graphs.update(_GRAPHS.get(name, ()))
        graphs.update(() if names else _WHOLE_LAYER)
    return Software(
        router_fusion=bool(args.moe_router_fusion),
        permute_fusion=bool(args.moe_permute_fusion),
        rope_fusion=bool(args.apply_rope_fusion),
        router_padding=bool(args.moe_router_padding_for_quantization),
        fused_attention=getattr(args.attention_backend, "name", "auto") not in ("unfused", "local"),
        cross_entropy=loss,
        graphs=frozenset(graphs),
    )


def _layout(found: Launched, num_stages: int) -> Layout:
    args = found.args
    schedule, pp = args.pipeline_schedule, _pipeline_ranks(found)
    chunks, overlap, apart = 1, True, True
    if schedule == "1f1b":
        chunks = num_stages // pp
        overlap = bool(args.overlap_moe_expert_parallel_comm)
        apart = not overlap or args.delay_wgrad_compute
        schedule = megatrons_schedule(pp, chunks, overlap)
    dealt: dict[str, Any] = {}
    if TRAITS[args.pipeline_schedule].chunks_choice:
        chunks, dealt = num_stages // pp, given_options(args)
    return Layout(
        num_gpus=found.world,
        tp=args.tensor_model_parallel_size,
        pp=pp,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=(args.expert_tensor_parallel_size or 1) if args.num_experts else 1,
        schedule=schedule,
        num_model_chunks=chunks,
        microbatch_group_size=args.microbatch_group_size_per_vp_stage if schedule == INTERLEAVED else None,
        zigzag=tuple(sorted(dealt.items())),
        overlap_pairs=overlap,
        wgrad_apart=apart,
    )


def _pipeline_ranks(found: Launched) -> int:
    """As given: schedules of ours change the argument."""
    return getattr(found.given, "pipeline_model_parallel_size", None) or 1


def _stages(found: Launched) -> list[Stage]:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    args, given = found.args, found.given
    moe = [bool(flag) for flag in _pattern(args)]
    notation, mtp = getattr(given, "pipeline_model_parallel_layout", None), args.mtp_num_layers or 0
    if notation:
        rows = [
            [layer.name for layer in stage]
            for stage in PipelineParallelLayerLayout.parse_str_to_list(notation)
        ]
    else:
        rows = _even_rows(found, mtp)
    stages, first = [], 0
    for row in rows:
        count = row.count("decoder")
        num_moe = sum(moe[first : first + count])
        stages.append(
            Stage(
                dense=count - num_moe,
                moe=num_moe,
                mtp=row.count("mtp"),
                embedding="embedding" in row,
                head="loss" in row,
            )
        )
        first += count
    return stages


def _even_rows(found: Launched, mtp: int) -> list[list[str]]:
    """Megatron's own division: evenly, but for the first and last stage's given numbers and what counts as a layer."""
    args, given, pp = found.args, found.given, _pipeline_ranks(found)
    chunks = getattr(given, "num_virtual_stages_per_pipeline_rank", None)
    per_chunk = getattr(given, "num_layers_per_virtual_pipeline_stage", None)
    if per_chunk:
        chunks = args.num_layers // pp // per_chunk
    num_stages = pp * (chunks or 1)
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        if num_stages != pp:
            raise PlanError(
                "decoder_first_pipeline_num_layers with virtual stages: use pipeline_model_parallel_layout, which says "
                "what each stage holds"
            )
        others = pp - (first is not None) - (last is not None)
        rest = args.num_layers - (first or 0) - (last or 0)
        counts = [rest // max(1, others)] * others
        counts = [*([first] if first is not None else []), *counts, *([last] if last is not None else [])]
    else:
        extra = [args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split]
        total = args.num_layers + sum(map(bool, extra))
        counts = [total // num_stages] * num_stages
        counts[0] -= bool(extra[0])
        counts[-1] -= bool(extra[1])
    if sum(counts) != args.num_layers:
        raise PlanError(
            f"num_layers={args.num_layers} does not divide into {num_stages} stages: use "
            "pipeline_model_parallel_layout=auto"
        )
    rows = [["decoder"] * count for count in counts]
    rows[0].insert(0, "embedding")
    rows[-1] += ["mtp"] * mtp + ["loss"]
    return rows


def _pattern(args: Namespace) -> list[Any]:
    if not args.num_experts:
        return [0] * args.num_layers
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(args.num_layers)]
    if len(frequency) != args.num_layers:
        raise PlanError(
            f"moe_layer_freq={''.join(map(str, frequency))} is of {len(frequency)} layers, but num_layers="
            f"{args.num_layers}: give one number for each layer"
        )
    return list(frequency)


def _precision(args: Namespace) -> Precision:
    low = args.bf16 or args.fp16
    moments = [args.exp_avg_dtype, args.exp_avg_sq_dtype] if args.use_precision_aware_optimizer else []
    recipe = recipe_of(args)
    fp4 = bool(getattr(args, "fp4", None))
    name = "dsv3" if recipe is not None else "nvfp4" if fp4 else str(args.fp8_recipe) if args.fp8 else ""
    return Precision(
        compute=2 if low else 4,
        fp8=bool(args.fp8) or fp4 or recipe is not None,
        fp8_caches=recipe is not None,
        fp8_dispatch=recipe is not None and recipe.dispatch == "e4m3",
        recipe=name,
        fp8_attention=bool(getattr(args, "fp8_dot_product_attention", False)),
        fp8_head=bool(getattr(args, "fp8_output_proj", False)),
        fp8_parameters=bool(args.fp8_param_gather),
        main_gradient=4 if args.accumulate_allreduce_grads_in_fp32 or not low else 2,
        master=4 if low else 0,
        moment=sum(moment.itemsize for moment in moments) / 2 if moments else 4,
    )


def _recompute(args: Namespace) -> frozenset[str]:
    again = {"moe_act"} if recipe_of(args) else set()  # R§3.3.3: SwiGLU's output is not kept
    if args.recompute_granularity == "full":
        return frozenset({"full"})
    if args.recompute_granularity == "selective":
        return frozenset(again.union(args.recompute_modules or ("core_attn",)))
    return frozenset(again)


def _recomputed_layers(args: Namespace) -> int | None:
    """`--recompute-method block`: the first so many layers of a stage; `uniform` is all of them."""
    if args.recompute_granularity == "full" and args.recompute_method == "block":
        return args.recompute_num_layers
    return None


def _recomputed_together(args: Namespace) -> int:
    """`--recompute-method uniform`: layers of which one input is kept."""
    if args.recompute_granularity == "full" and args.recompute_method == "uniform":
        return args.recompute_num_layers or 1
    return 1
