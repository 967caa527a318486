"""What a GPU job asks of the machines, libraries and environment it will run with."""

from argparse import Namespace
from dataclasses import replace

from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.requirements import CUDA, CUDNN, TE, TORCH, lacking, oldest, version_key
from dsv3_megatron.arguments.surroundings import MAX_CONNECTIONS, Surroundings
from dsv3_megatron.fp8.precision import recipe_of
from dsv3_megatron.pipeline.traits import TRAITS

GPU, FP8 = "GPU and libraries", "Precision"
HERE = Surroundings(world_size=8)
_TE = "--transformer-impl transformer_engine"
_FP8 = f"--fp8-recipe dsv3 --bf16 {_TE}"
_SCHEDULE = "--pipeline-schedule zb1p --pipeline-model-parallel-size 2"


def _te(a: Namespace) -> bool:
    return a.transformer_impl == "transformer_engine"


def _block_scaled(a: Namespace) -> bool:
    """Whether TE multiplies with block scales."""
    return _te(a) and (recipe_of(a) is not None or (a.fp8 is not None and a.fp8_recipe == "blockwise"))


def _overlaps(a: Namespace) -> bool:
    """Whether messages and pairs of a schedule of ours run beside computation."""
    return a.pipeline_schedule != "1f1b"


def wants_one_connection(a: Namespace, s: Surroundings) -> bool:
    """Megatron's own rule for tensor and context parallelism before Blackwell (training/arguments.py)."""
    return (
        (a.tensor_model_parallel_size > 1 or a.context_parallel_size > 1)
        and s.capability < (10, 0)
        and not (
            a.use_torch_fsdp2 or a.use_megatron_fsdp or a.overlap_moe_expert_parallel_comm or _overlaps(a)
        )
    )


ROWS = (
    Refusal(
        "max_connections_overlap",
        GPU,
        MAX_CONNECTIONS,
        "{max_connections}",
        lambda a, s: not s.on_cpu and _overlaps(a) and s.max_connections < 8,
        "--pipeline-schedule {pipeline_schedule} runs messages and all-to-all beside computation; with fewer than 8 "
        "hardware queues they wait for each other, and can wait for ever",
        f"export {MAX_CONNECTIONS}=32",
        _SCHEDULE,
        replace(HERE, max_connections=1),
    ),
    Refusal(
        "max_connections_tensor_parallel",
        GPU,
        MAX_CONNECTIONS,
        "{max_connections}",
        lambda a, s: not s.on_cpu and wants_one_connection(a, s) and s.max_connections != 1,
        "under Megatron's own schedule tensor and context parallelism count on the order of one queue",
        f"export {MAX_CONNECTIONS}=1, or a --pipeline-schedule of ours, which does not",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        replace(HERE, max_connections=32),
    ),
    Refusal(
        "torch_version",
        GPU,
        "torch",
        "{torch}",
        lambda a, s: bool(s.torch) and too_old(TORCH, s.torch),
        "is older than what is tested",
        f"torch {oldest(TORCH)} or newer",
        "",
        replace(HERE, torch="2.9.1"),
    ),
    Refusal(
        "te_version",
        GPU,
        "--transformer-impl",
        "{transformer_impl}",
        lambda a, s: _te(a) and not s.on_cpu and s.has_te and "delayed_wgrad" in s.lacks,
        "the installed Transformer Engine has no weight gradients that can wait with hooks for their reduction",
        f"Transformer Engine {oldest(TE)} or newer, or --transformer-impl local",
        "",
        replace(HERE, lacks=frozenset({"delayed_wgrad"})),
    ),
    Refusal(
        "fp8_cuda",
        FP8,
        "--fp8-recipe",
        "on CUDA {cuda}",
        lambda a, s: _block_scaled(a) and bool(s.cuda) and too_old(CUDA, s.cuda),
        "cuBLASLt multiplies with block scales from CUDA 12.9 on; Transformer Engine would say so at its first product",
        "a torch built for CUDA 12.9 or newer, or --transformer-impl local",
        _FP8,
        replace(HERE, cuda="12.8"),
    ),
    Refusal(
        "fp8_gpu",
        FP8,
        "--fp8-recipe",
        "on a GPU of compute capability {capability}",
        lambda a, s: _block_scaled(a) and not s.on_cpu and s.capability < (9, 0),
        "E4M3 products with block scales need Hopper (9.0) or newer",
        "--bf16 alone, or other GPUs",
        _FP8,
        replace(HERE, capability=(8, 0)),
    ),
    Refusal(
        "mla_attention",
        GPU,
        "cuDNN",
        "{cudnn}",
        lambda a, s: _te(a) and not s.on_cpu and bool(s.cudnn) and not _attends(s),
        "has no fused attention for MLA's head sizes, 192 and 128; Transformer Engine would keep whole attention "
        "matrices instead",
        "cuDNN 9.5 or newer on Hopper, 9.11 on Blackwell, and not 9.10.0 or 9.10.1",
        "",
        replace(HERE, cudnn="9.4.0"),
    ),
    Refusal(
        "mirrors_without_zero",
        GPU,
        "--use-distributed-optimizer",
        "not given",
        lambda a, s: (
            not s.on_cpu
            and TRAITS[a.pipeline_schedule].directions == 2
            and a.clip_grad > 0
            and not a.use_distributed_optimizer
            and not a.check_weight_hash_across_dp_replicas_interval
        ),
        "mirrored copies of a stage would compute the clipping norm in different communicators, and a last bit can "
        "separate them unseen",
        "--use-distributed-optimizer, whose mirrors share one optimizer, or "
        "--check-weight-hash-across-dp-replicas-interval N, which compares them",
        "--pipeline-schedule dualpipe --pipeline-model-parallel-size 2 --global-batch-size 32",
    ),
)


def too_old(package: str, version: str) -> bool:
    """Whether a version is older than the oldest that is supported."""
    return version_key(version) < version_key(oldest(package))


def _attends(s: Surroundings) -> bool:
    missing = lacking(CUDNN, s.cudnn)
    broken = s.cudnn.startswith(("9.10.0", "9.10.1"))
    needed = "mla_attention_blackwell" if s.capability >= (10, 0) else "mla_attention"
    return needed not in missing and not broken
