"""Precision, and what the reference backend, the CPU runtime or missing packages rule out."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.table import Refusal, has_cuda_graphs
from dsv3_megatron.arguments.requirements import TE, oldest
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.fp8.precision import recipe_of

PRECISION, REFERENCE, CPU = "Precision", "Reference backend", "CPU runtime"
ON_CPU = Surroundings(world_size=8, on_cpu=True, has_te=False, has_deepep=False)


def _reference(a: Namespace) -> bool:
    return a.transformer_impl == "local"


def _recipe(a: Namespace) -> str:
    """The name of our FP8 recipe, "" for none."""
    recipe = recipe_of(a)
    return recipe.name if recipe else ""


def _dispatches_e4m3(a: Namespace) -> bool:
    recipe = recipe_of(a)
    return recipe is not None and recipe.dispatch == "e4m3"


ROWS = (
    Refusal(
        "fp16",
        PRECISION,
        "--fp16",
        "",
        lambda a, s: a.fp16,
        "routing weights and unscaled gradients overflow or vanish in half precision",
        "--bf16",
        "--fp16",
    ),
    Refusal(
        "fp4",
        PRECISION,
        "--fp4-format",
        "{fp4}",
        lambda a, s: a.fp4 is not None,
        "DeepSeek-V3 was trained in E4M3 (R§3.3)",
        "--fp8-recipe dsv3",
        "--fp4-format e2m1 --bf16",
    ),
    Refusal(
        "fp8_hybrid",
        PRECISION,
        "--fp8-format",
        "{fp8}",
        lambda a, s: a.fp8 not in (None, "e4m3"),
        "gradients are E4M3 as well (R§3.3.2)",
        "--fp8-format e4m3",
        "--fp8-format hybrid --fp8-recipe blockwise --bf16 --transformer-impl transformer_engine",
    ),
    Refusal(
        "fp8_recipe",
        PRECISION,
        "--fp8-recipe",
        "{fp8_recipe}",
        lambda a, s: a.fp8 is not None and a.fp8_recipe not in ("blockwise", "custom"),
        "is not the fine-grained quantisation of R§3.3.2 (1×128 tiles, 128×128 blocks)",
        "--fp8-recipe dsv3",
        "--fp8-format e4m3 --fp8-recipe delayed --bf16 --transformer-impl transformer_engine",
    ),
    Refusal(
        "fp8_dsv3_without_bf16",
        PRECISION,
        "--fp8-recipe dsv3",
        "",
        lambda a, s: bool(_recipe(a)) and not a.bf16,
        "what is not FP8 is bf16 (R§3.3.1)",
        "--bf16 as well",
        "--fp8-recipe dsv3 --transformer-impl local",
    ),
    Refusal(
        "fp8_study_recipes",
        PRECISION,
        "--fp8-recipe",
        "",
        lambda a, s: _recipe(a) not in ("", "dsv3") and not _reference(a),
        "other than dsv3 is a departure from the report that only the reference backend tries",
        "--fp8-recipe dsv3, or --transformer-impl local",
        "--fp8-recipe dsv3_per_tensor --bf16 --transformer-impl transformer_engine",
        detail=lambda a, s: _recipe(a),
    ),
    Refusal(
        "fp8_dsv3_te_version",
        PRECISION,
        "--fp8-recipe dsv3",
        "",
        lambda a, s: bool(_recipe(a)) and not _reference(a) and bool(s.te_lacks),
        "the installed Transformer Engine has no {te_lacks}",
        f"Transformer Engine {oldest(TE)} or newer, or --transformer-impl local",
        "--fp8-recipe dsv3 --bf16 --transformer-impl transformer_engine",
        Surroundings(world_size=8, te_lacks="Float8BlockScaling"),
    ),
    Refusal(
        "fp8_dsv3_fp32_scales",
        PRECISION,
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1",
        "",
        lambda a, s: _dispatches_e4m3(a) and not _reference(a) and s.te_fp32_scales,
        "what arrives in E4M3 with scales that are powers of two (R§3.3.3) would be rounded a second time by experts "
        "whose scales are not",
        "the default, powers of two everywhere, or --fp8-dispatch bf16",
        "--fp8-recipe dsv3 --bf16 --transformer-impl transformer_engine",
        Surroundings(world_size=8, te_fp32_scales=True),
    ),
    Refusal(
        "fp8_dispatch_without_recipe",
        PRECISION,
        "--fp8-dispatch",
        "{fp8_dispatch}",
        lambda a, s: a.fp8_dispatch is not None and not _recipe(a),
        "belongs to --fp8-recipe dsv3; without it dispatch is bf16",
        "--fp8-recipe dsv3 as well, or leave it out",
        "--fp8-dispatch e4m3 --bf16",
    ),
    Refusal(
        "fp8_dispatch_flex",
        PRECISION,
        "--moe-flex-dispatcher-backend",
        "{moe_flex_dispatcher_backend}",
        lambda a, s: (
            _dispatches_e4m3(a)
            and a.moe_token_dispatcher_type == "flex"
            and a.moe_flex_dispatcher_backend != "deepep"
        ),
        "Megatron 0.19 can pass it nothing but bf16, --fp8-recipe dsv3 dispatches E4M3 (R§3.3.3)",
        "--fp8-dispatch bf16, or --moe-flex-dispatcher-backend deepep",
        "--fp8-recipe dsv3 --bf16 --transformer-impl local --moe-token-dispatcher-type flex "
        "--moe-flex-dispatcher-backend hybridep",
    ),
    Refusal(
        "fp8_dispatch_allgather",
        PRECISION,
        "--moe-token-dispatcher-type",
        "{moe_token_dispatcher_type}",
        lambda a, s: _dispatches_e4m3(a) and a.moe_token_dispatcher_type == "allgather",
        "gathers all tokens in bf16, --fp8-recipe dsv3 dispatches E4M3 (R§3.3.3)",
        "--moe-token-dispatcher-type alltoall, or --fp8-dispatch bf16",
        "--fp8-recipe dsv3 --bf16 --transformer-impl local --moe-token-dispatcher-type allgather",
    ),
    Refusal(
        "fp8_dispatch_deepep_width",
        PRECISION,
        "--hidden-size",
        "{hidden_size}",
        lambda a, s: (
            _dispatches_e4m3(a)
            and a.moe_token_dispatcher_type == "flex"
            and a.moe_flex_dispatcher_backend == "deepep"
            and a.hidden_size % 128 != 0
        ),
        "DeepEP sends E4M3 with a scale per 128 numbers, which must divide it",
        "a multiple of 128, or --fp8-dispatch bf16",
        "--fp8-recipe dsv3 --bf16 --transformer-impl local --moe-token-dispatcher-type flex",
    ),
    Refusal(
        "fp8_dsv3_shared_expert_overlap",
        PRECISION,
        "--moe-shared-expert-overlap",
        "",
        lambda a, s: bool(_recipe(a)) and a.moe_shared_expert_overlap,
        "runs the shared expert in pieces inside the dispatcher, --fp8-recipe dsv3 has a dispatcher of its own",
        "--pipeline-schedule dualpipe, which overlaps the shared expert as well",
        "--fp8-recipe dsv3 --bf16 --transformer-impl local --moe-shared-expert-overlap",
    ),
    Refusal(
        "fp8_dsv3_swiglu",
        PRECISION,
        "--use-transformer-engine-op-fuser / --use-te-activation-func / --moe-mlp-glu-interleave-size / "
        "--moe-shared-expert-glu-interleave-size / --glu-linear-offset / --moe-paged-stash",
        "",
        lambda a, s: (
            bool(_recipe(a))
            and bool(
                a.use_transformer_engine_op_fuser
                or a.use_te_activation_func
                or a.moe_mlp_glu_interleave_size
                or a.moe_shared_expert_glu_interleave_size
                or a.glu_linear_offset
                or a.moe_paged_stash
            )
        ),
        "--fp8-recipe dsv3 has a SwiGLU of its own, whose input is kept in E4M3 (R§3.3.3)",
        "none of them",
        "--fp8-recipe dsv3 --bf16 --transformer-impl local --use-te-activation-func",
    ),
    Refusal(
        "fp8_param_gather",
        PRECISION,
        "--fp8-param-gather",
        "",
        lambda a, s: a.fp8_param_gather,
        "initial weights are set by name once the modules are built, but the optimizer's fp32 weights would start from "
        "those that Transformer Engine drew before",
        "weights in bf16: leave it out",
        "--fp8-format e4m3 --fp8-recipe blockwise --bf16 --use-distributed-optimizer --fp8-param-gather",
    ),
    Refusal(
        "fp8_dsv3_offloading",
        PRECISION,
        "--cpu-offloading-num-layers / --fine-grained-activation-offloading",
        "",
        lambda a, s: (
            bool(_recipe(a)) and bool(a.cpu_offloading_num_layers or a.fine_grained_activation_offloading)
        ),
        "--fp8-recipe dsv3 gives up the memory of the attention's output (R§3.3.3), which offloading would still read",
        "none of them, and --recompute-granularity selective for memory",
        "--fp8-recipe dsv3 --bf16 --fine-grained-activation-offloading --offload-modules core_attn",
    ),
    Refusal(
        "fp8_without_bf16",
        PRECISION,
        "--fp8-format",
        "{fp8}",
        lambda a, s: a.fp8 is not None and not (a.bf16 or a.fp16),
        "what is not FP8 is bf16 (R§3.3.1)",
        "--bf16 as well",
        "--fp8-format e4m3 --fp8-recipe blockwise --transformer-impl transformer_engine",
    ),
    Refusal(
        "fp8_reference",
        REFERENCE,
        "--fp8-format",
        "{fp8}",
        lambda a, s: a.fp8 is not None and _reference(a),
        "the reference backend has no FP8 kernels; it emulates --fp8-recipe dsv3, which needs no format",
        "--fp8-recipe dsv3 alone, or --transformer-impl transformer_engine",
        "--fp8-format e4m3 --fp8-recipe blockwise --bf16 --transformer-impl local",
    ),
    Refusal(
        "cp_reference",
        REFERENCE,
        "--cp-comm-type",
        "{cp_comm_type}",
        lambda a, s: (
            _reference(a)
            and a.context_parallel_size > 1
            and (list(a.cp_comm_type) != ["all_gather"] or bool(a.hierarchical_context_parallel_sizes))
        ),
        "the reference backend gathers keys and values over context-parallel ranks",
        "--cp-comm-type all_gather",
        "--context-parallel-size 2 --cp-comm-type p2p --transformer-impl local",
    ),
    Refusal(
        "grouped_gemm_reference",
        REFERENCE,
        "--moe-grouped-gemm",
        "",
        lambda a, s: _reference(a) and a.moe_grouped_gemm,
        "the reference backend runs its experts one after another",
        "--transformer-impl transformer_engine, or leave it out",
        "--moe-grouped-gemm --transformer-impl local",
    ),
    Refusal(
        "fused_reference",
        REFERENCE,
        "--moe-permute-fusion / --moe-router-fusion / --mla-down-proj-fusion",
        "",
        lambda a, s: (
            _reference(a) and (a.moe_permute_fusion or a.moe_router_fusion or a.mla_down_proj_fusion)
        ),
        "these are Transformer Engine kernels",
        "--transformer-impl transformer_engine, or leave them out",
        "--moe-permute-fusion --transformer-impl local",
    ),
    Refusal(
        "attention_logit_reference",
        REFERENCE,
        "--log-max-attention-logit",
        "",
        lambda a, s: _reference(a) and a.log_max_attention_logit,
        "the reference backend's attention does not keep its logits",
        "--transformer-impl transformer_engine, or leave it out",
        "--log-max-attention-logit --transformer-impl local",
    ),
    Refusal(
        "layers_in_bf16_reference",
        REFERENCE,
        "--first-last-layers-bf16",
        "",
        lambda a, s: _reference(a) and a.first_last_layers_bf16,
        "the reference backend emulates --fp8-recipe dsv3, which is FP8 in all layers (R§3.3.1)",
        "--transformer-impl transformer_engine, or leave it out",
        "--first-last-layers-bf16 --fp8-recipe dsv3 --bf16 --transformer-impl local",
    ),
    Refusal(
        "offload_reference",
        REFERENCE,
        "--cpu-offloading-num-layers / --fine-grained-activation-offloading",
        "",
        lambda a, s: (
            _reference(a) and bool(a.cpu_offloading_num_layers or a.fine_grained_activation_offloading)
        ),
        "activations are moved by Transformer Engine",
        "--transformer-impl transformer_engine, or leave it out",
        "--cpu-offloading-num-layers 2 --transformer-impl local",
    ),
    Refusal(
        "tp_overlap_reference",
        REFERENCE,
        "--tp-comm-overlap",
        "",
        lambda a, s: _reference(a) and a.tp_comm_overlap,
        "is done by Transformer Engine's GEMMs",
        "--transformer-impl transformer_engine, or leave it out",
        "--tp-comm-overlap --tensor-model-parallel-size 2 --sequence-parallel --transformer-impl local",
    ),
    Refusal(
        "local_attention",
        "Backends",
        "--attention-backend",
        "local",
        lambda a, s: a.attention_backend.name == "local",
        "Megatron's local attention cannot hold MLA's heads",
        "auto, the default; --transformer-impl local for plain PyTorch",
        "--attention-backend local",
    ),
    Refusal(
        "router_fusion",
        "Routing",
        "--moe-router-fusion",
        "",
        lambda a, s: a.moe_router_fusion,
        "the fused router does not follow R§2.1.2 exactly",
        "the default",
        "--moe-router-fusion --transformer-impl transformer_engine",
    ),
    Refusal(
        "inference_backend",
        "Backends",
        "--transformer-impl",
        "{transformer_impl}",
        lambda a, s: a.transformer_impl == "inference_optimized",
        "is not a training backend",
        "transformer_engine, or local for the reference backend",
        "--transformer-impl inference_optimized",
    ),
    Refusal(
        "te_missing",
        "Backends",
        "--transformer-impl",
        "{transformer_impl}",
        lambda a, s: a.transformer_impl == "transformer_engine" and not s.has_te and not s.on_cpu,
        "Transformer Engine is not installed",
        "pip install 'dsv3_megatron[te]', or --transformer-impl local",
        "--transformer-impl transformer_engine",
        Surroundings(world_size=8, has_te=False),
    ),
    Refusal(
        "flex_without_deepep",
        "Backends",
        "--moe-token-dispatcher-type",
        "{moe_token_dispatcher_type}",
        lambda a, s: (
            a.moe_token_dispatcher_type == "flex"
            and a.moe_flex_dispatcher_backend == "deepep"
            and not s.has_deepep
            and not s.on_cpu
        ),
        "DeepEP (Python package deep_ep) is not installed",
        "alltoall, or install DeepEP from its repository",
        "--moe-token-dispatcher-type flex",
        Surroundings(world_size=8, has_deepep=False),
    ),
    Refusal(
        "te_on_cpu",
        CPU,
        "--transformer-impl",
        "{transformer_impl}",
        lambda a, s: s.on_cpu and not _reference(a),
        "Transformer Engine's kernels run on GPUs only",
        "--transformer-impl local",
        "--transformer-impl transformer_engine",
        ON_CPU,
    ),
    Refusal(
        "flex_on_cpu",
        CPU,
        "--moe-token-dispatcher-type",
        "{moe_token_dispatcher_type}",
        lambda a, s: s.on_cpu and a.moe_token_dispatcher_type == "flex",
        "DeepEP's kernels run on GPUs only",
        "alltoall",
        "--moe-token-dispatcher-type flex",
        ON_CPU,
    ),
    Refusal(
        "cuda_graphs_on_cpu",
        CPU,
        "--cuda-graph-impl",
        "{cuda_graph_impl}",
        lambda a, s: s.on_cpu and has_cuda_graphs(a),
        "there are no CUDA graphs without a GPU",
        "none, the default",
        "--cuda-graph-impl local",
        ON_CPU,
    ),
    Refusal(
        "offload_on_cpu",
        CPU,
        "--cpu-offloading-num-layers / --optimizer-cpu-offload / --fine-grained-activation-offloading",
        "",
        lambda a, s: (
            s.on_cpu
            and bool(
                a.cpu_offloading_num_layers or a.optimizer_cpu_offload or a.fine_grained_activation_offloading
            )
        ),
        "everything is in CPU memory already",
        "none of them",
        "--optimizer-cpu-offload --use-precision-aware-optimizer",
        ON_CPU,
    ),
    Refusal(
        "sniff_test_on_cpu",
        CPU,
        "--gpu-sniff-test-interval",
        "{gpu_sniff_test_interval}",
        lambda a, s: s.on_cpu and a.gpu_sniff_test_interval is not None,
        "there is no GPU to test",
        "the default",
        "--gpu-sniff-test-interval 1",
        ON_CPU,
    ),
    Refusal(
        "tp_overlap_on_cpu",
        CPU,
        "--tp-comm-overlap",
        "",
        lambda a, s: s.on_cpu and a.tp_comm_overlap,
        "is done by Transformer Engine's GEMMs",
        "the default",
        "--tp-comm-overlap --tensor-model-parallel-size 2 --sequence-parallel",
        ON_CPU,
    ),
)
