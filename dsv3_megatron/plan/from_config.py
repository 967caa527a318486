"""From the trainer's configuration to a `Job`: what is planned is what would be launched.

The arguments go through the trainer's own refusals and Megatron's own validation, at the real world size.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from dsv3_megatron.conf.argv import to_megatron_argv
from dsv3_megatron.conf.check import world_size
from dsv3_megatron.fp8.precision import recipe_of
from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.pipeline.build import INTERLEAVED
from dsv3_megatron.plan.counting import count_parameters, quiet
from dsv3_megatron.plan.hardware import Gpu, gpu_named
from dsv3_megatron.plan.host_memory import HostMemory, host_memory
from dsv3_megatron.plan.job import Job, Layout, PlanError, Precision, Stage
from dsv3_megatron.plan.parameters import ParameterCounts, held_by


@dataclass(frozen=True)
class Planned:
    """A configuration as the planner takes it.

    Attributes:
        host: what a machine needs of its own memory, None without a distributed optimizer.
        host_available: bytes of a machine, None where the cluster does not say.
        memory_efficient: `--distrib-optim-fully-reshardable-mem-efficient`.
    """

    job: Job
    gpu: Gpu
    counts: ParameterCounts
    host: HostMemory | None = None
    host_available: float | None = None
    memory_efficient: bool = False


def from_config(cfg: DictConfig, load_imbalance: float) -> Planned:
    """For a configuration from `dsv3_megatron.conf.compose`; needs `dsv3_megatron.cpu.activate()`.

    Errors: RefusedArgument, from the trainer's own checks or the planner's.
    """
    gpu = gpu_named(cfg.cluster.gpu)
    args = validated_args(cfg)
    counts = count_parameters(cfg, args.tensor_model_parallel_size)
    job = _job(cfg, args, counts, load_imbalance)
    gb = cfg.cluster.get("host_memory_gb")
    return Planned(
        job,
        gpu,
        counts,
        _host(cfg, args, job, counts) if args.use_distributed_optimizer else None,
        None if gb is None else gb * 1e9,
        args.distrib_optim_fully_reshardable_mem_efficient,
    )


def _host(cfg: DictConfig, args: Namespace, job: Job, counts: ParameterCounts) -> HostMemory:
    """Of a machine full of the fullest rank's like."""
    from dsv3_megatron.plan.step import schedule_of

    schedule = schedule_of(job)
    stages = [
        tuple(sorted({stage for stage, _ in schedule.stages_of(rank)})) for rank in range(schedule.num_ranks)
    ]
    held = max((held_by(job, counts, of_rank) for of_rank in stages), key=lambda h: h.experts + h.rest)
    return host_memory(
        held.experts,
        held.rest,
        cfg.cluster.gpus_per_node,
        dense_ranks_per_stage=job.layout.tp * job.layout.cp,
        reshardable=args.dist_ckpt_optim_fully_reshardable,
        memory_efficient=args.distrib_optim_fully_reshardable_mem_efficient,
        average=args.ema_decay is not None,
        async_save=args.async_save,
    )


def validated_args(cfg: DictConfig) -> Namespace:
    """Megatron's arguments of rank 0; the modules are those that exist everywhere.

    Errors: RefusedArgument, from the trainer's refusals or Megatron's.
    """
    from dsv3_megatron import dualpipe
    from dsv3_megatron.dryrun.world import MODULES_EVERYWHERE, megatron_args, without_kernels

    words = [*without_kernels(to_megatron_argv(at_full_batch(cfg))), *MODULES_EVERYWHERE]
    try:
        with quiet():
            return megatron_args(words, 0, world_size(cfg), cfg.cluster.gpus_per_node)
    finally:
        dualpipe.activate("1f1b", None)


def at_full_batch(cfg: DictConfig) -> DictConfig:
    """Without a batch ramp: a plan is of one step, at global_batch_size. The ramp's own steps are planned one by one,
    with global_batch_size=…"""
    full = cfg.copy()
    for name in ("batch_ramp", "step_batch_size_schedule"):
        if full.get("global_batch_size") is not None and name in full:
            full[name] = None
    return full


def _job(cfg: DictConfig, args: Namespace, counts: ParameterCounts, load_imbalance: float) -> Job:
    if not args.global_batch_size:
        raise PlanError("global_batch_size is not set: give the number of sequences of a step")
    if args.num_experts and (args.expert_tensor_parallel_size or 1) != 1:
        raise PlanError(
            f"expert_tensor_parallel_size={args.expert_tensor_parallel_size}: the planner knows whole experts; use "
            "expert_tensor_parallel_size=1 (Megatron's default is tensor_model_parallel_size)"
        )
    stages = tuple(_stages(cfg, args))
    layout = _layout(cfg, args, len(stages))
    args.num_moe_experts = args.num_experts  # as Megatron's model configuration calls it
    sizes = ModelSizes.from_config(args, counts.padded_vocab_size, args.seq_length)
    return Job(
        sizes=sizes,
        layout=layout,
        stages=stages,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        precision=_precision(args),
        recompute=_recompute(args),
        distributed_optimizer=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        transformer_impl=cfg.get("transformer_impl") or "transformer_engine",
        dispatcher=cfg.get("moe_token_dispatcher_type"),
        moe_router_num_groups=args.moe_router_num_groups or 1,
        moe_router_group_topk=args.moe_router_group_topk or 1,
        load_imbalance=load_imbalance,
        balance_loss=bool(args.moe_aux_loss_coeff),
        whole_iteration_graph=args.cuda_graph_impl == "full_iteration",
    )


def _layout(cfg: DictConfig, args: Namespace, num_stages: int) -> Layout:
    schedule, pp = args.pipeline_schedule, cfg.get("pipeline_model_parallel_size") or 1
    chunks, overlap = 1, True
    if schedule == "1f1b":
        chunks = num_stages // pp
        overlap = bool(args.overlap_moe_expert_parallel_comm)
        schedule = INTERLEAVED if chunks > 1 else schedule
    return Layout(
        num_gpus=world_size(cfg),
        tp=args.tensor_model_parallel_size,
        pp=pp,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        schedule=schedule,
        num_model_chunks=chunks,
        microbatch_group_size=args.microbatch_group_size_per_vp_stage if chunks > 1 else None,
        overlap_pairs=overlap,
    )


def _stages(cfg: DictConfig, args: Namespace) -> list[Stage]:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    moe = [bool(flag) for flag in _pattern(args)]
    notation, mtp = cfg.get("pipeline_model_parallel_layout"), args.mtp_num_layers or 0
    if notation:
        rows = [
            [layer.name for layer in stage]
            for stage in PipelineParallelLayerLayout.parse_str_to_list(notation)
        ]
    else:
        num_stages = (cfg.get("pipeline_model_parallel_size") or 1) * (
            cfg.get("num_virtual_stages_per_pipeline_rank") or 1
        )
        if args.num_layers % num_stages:
            raise PlanError(
                f"num_layers={args.num_layers} does not divide into {num_stages} stages: use "
                "pipeline_model_parallel_layout=auto"
            )
        rows = [["decoder"] * (args.num_layers // num_stages) for _ in range(num_stages)]
        rows[0].insert(0, "embedding")
        rows[-1] += ["mtp"] * mtp + ["loss"]
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


def _pattern(args: Namespace) -> list[Any]:
    if not args.num_experts:
        return [0] * args.num_layers
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(args.num_layers)]
    return list(frequency)


def _precision(args: Namespace) -> Precision:
    low = args.bf16 or args.fp16
    moment = getattr(args, "exp_avg_dtype", None)
    recipe = recipe_of(args)
    return Precision(
        compute=2 if low else 4,
        fp8=bool(args.fp8) or recipe is not None,
        fp8_caches=recipe is not None,
        fp8_dispatch=recipe is not None and recipe.dispatch == "e4m3",
        main_gradient=4 if args.accumulate_allreduce_grads_in_fp32 or not low else 2,
        master=4 if low else 0,
        moment=moment.itemsize if moment is not None else 4,
    )


def _recompute(args: Namespace) -> frozenset[str]:
    again = {"moe_act"} if recipe_of(args) else set()  # R§3.3.3: SwiGLU's output is not kept
    if args.recompute_granularity == "full":
        return frozenset({"full"})
    if args.recompute_granularity == "selective":
        return frozenset(again.union(args.recompute_modules or ("core_attn",)))
    return frozenset(again)
