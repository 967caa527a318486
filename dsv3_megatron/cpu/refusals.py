"""Megatron arguments that cannot work on CPU: refused by name before anything is built."""

import functools
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock


class RefusedOnCpu(ValueError):
    """An argument asks for something that does not exist on CPU."""


@dataclass(frozen=True)
class Refusal:
    """`refuses(value)` is asked about `args.<name>` of a Megatron command line."""

    name: str
    refuses: Callable[[Any], bool]
    flag: str
    why: str
    fix: str


def is_true(value: Any) -> bool:
    return bool(value)


def is_false(value: Any) -> bool:
    return not value


def equals(*refused: Any) -> Callable[[Any], bool]:
    return lambda value: value in refused


def differs(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value not in allowed


FUSED = "a fused CUDA kernel"
TE = "Transformer Engine"
GRAPHS = "CUDA graphs"
NCCL = "NCCL"
OFFLOAD = "a memory besides the device's"
OMIT = "leave it out"

# fmt: off
REFUSALS: tuple[Refusal, ...] = (
    # On by default; CPU_FLAGS turns them off.
    Refusal("transformer_impl", differs("local"), "--transformer-impl", TE, "--transformer-impl local"),
    Refusal("apply_rope_fusion", is_true, "RoPE fusion (on by default)", FUSED, "--no-rope-fusion"),
    Refusal("no_persist_layer_norm", is_false, "persistent layer norm (on by default)", FUSED,
            "--no-persist-layer-norm"),
    Refusal("masked_softmax_fusion", is_true, "masked softmax fusion (on by default)", FUSED,
            "--no-masked-softmax-fusion"),
    # Kernels
    Refusal("fp8", is_true, "--fp8-format", TE, "leave it out (bf16 or fp32)"),
    Refusal("fp4", is_true, "--fp4-format", TE, "leave it out (bf16 or fp32)"),
    Refusal("moe_grouped_gemm", is_true, "--moe-grouped-gemm", TE, "leave it out (one GEMM per expert)"),
    Refusal("moe_permute_fusion", is_true, "--moe-permute-fusion", TE, OMIT),
    Refusal("moe_router_fusion", is_true, "--moe-router-fusion", TE, OMIT),
    Refusal("fused_residual_rmsnorm", is_true, "--fused-residual-rmsnorm", TE, OMIT),
    Refusal("te_rng_tracker", is_true, "--te-rng-tracker", TE, OMIT),
    Refusal("tp_comm_overlap", is_true, "--tp-comm-overlap", TE, OMIT),
    Refusal("use_flash_attn", is_true, "--use-flash-attn", "FlashAttention", OMIT),
    Refusal("batch_invariant_mode", is_true, "--batch-invariant-mode", "Triton kernels", OMIT),
    # CUDA graphs
    Refusal("cuda_graph_impl", differs("none"), "--cuda-graph-impl", GRAPHS, "--cuda-graph-impl none"),
    Refusal("enable_cuda_graph", is_true, "--enable-cuda-graph", GRAPHS, OMIT),
    Refusal("external_cuda_graph", is_true, "--external-cuda-graph", GRAPHS, OMIT),
    Refusal("optimizer_cuda_graph", is_true, "--optimizer-cuda-graph", GRAPHS, OMIT),
    # Communication
    Refusal("moe_token_dispatcher_type", equals("flex"), "--moe-token-dispatcher-type", "DeepEP or HybridEP",
            "--moe-token-dispatcher-type alltoall"),
    Refusal("moe_enable_deepep", is_true, "--moe-enable-deepep", "DeepEP", OMIT),
    Refusal("nccl_ub", is_true, "--use-nccl-ub", NCCL, OMIT),
    Refusal("use_sharp", is_true, "--use-sharp", NCCL, OMIT),
    Refusal("nccl_communicator_config_path", is_true, "--nccl-communicator-config-path", NCCL, OMIT),
    Refusal("high_priority_stream_groups", is_true, "--high-priority-stream-groups", NCCL, OMIT),
    # Memory
    Refusal("use_megatron_fsdp", is_true, "--use-megatron-fsdp", "the CUDA allocator",
            "--use-distributed-optimizer"),
    Refusal("use_torch_fsdp2", is_true, "--use-torch-fsdp2", "the CUDA allocator", "--use-distributed-optimizer"),
    Refusal("optimizer_cpu_offload", is_true, "--optimizer-cpu-offload", OFFLOAD, OMIT),
    Refusal("cpu_offloading_num_layers", is_true, "--cpu-offloading-num-layers", OFFLOAD, OMIT),
    Refusal("fine_grained_activation_offloading", is_true, "--fine-grained-activation-offloading", OFFLOAD, OMIT),
    # Tools
    Refusal("profile", is_true, "--profile", "the CUDA profiler", OMIT),
    Refusal("record_memory_history", is_true, "--record-memory-history", "the CUDA allocator", OMIT),
    Refusal("log_energy", is_true, "--log-energy", "NVML", OMIT),
)
# fmt: on


def check(args: Namespace, allow_te: bool = False) -> None:
    """Raise `RefusedOnCpu` naming every argument of `args` that cannot work on CPU, its value and the fix."""
    problems = []
    for refusal in REFUSALS:
        if allow_te and refusal.why == TE:
            continue  # construction only: the caller builds Transformer Engine modules and does not run them
        value = getattr(args, refusal.name, None)
        if value is not None and refusal.refuses(value):
            problems.append(
                f"{refusal.flag} ({refusal.name}={value!r}) needs {refusal.why}, which CPU does not have: "
                f"use {refusal.fix}"
            )
    if getattr(args, "async_save", False):
        if not args.use_persistent_ckpt_worker:
            problems.append(
                "--async-save is ignored by Megatron without --use-persistent-ckpt-worker: add it"
            )
        elif args.async_strategy != "mcore":
            problems.append(
                f"--async-strategy {args.async_strategy} needs nvidia-resiliency-ext, whose workers do not have "
                "the CPU runtime: use --async-strategy mcore"
            )
    if problems:
        raise RefusedOnCpu("dsv3_megatron.cpu: " + "\n".join(problems))


def checked_parsing(original: Callable) -> Callable:
    """Stand-in for `megatron.training.arguments.parse_and_validate_args`, which trainers call.

    `validate_args` itself stays as it is: a dry run validates the arguments of a job for GPUs with it.
    """

    @functools.wraps(original)
    def parse_and_validate_args(*args: Any, **kwargs: Any) -> Any:
        arguments = sys.modules[original.__module__]
        validate_args = arguments.validate_args  # type: ignore[attr-defined]

        @functools.wraps(validate_args)
        def check_and_validate(parsed: Namespace, *more: Any) -> Any:
            # sys.modules holds None for it unless the caller asked for Transformer Engine.
            check(parsed, allow_te=sys.modules.get("transformer_engine", False) is not None)
            return validate_args(parsed, *more)

        with mock.patch.object(arguments, "validate_args", check_and_validate):
            return original(*args, **kwargs)

    return parse_and_validate_args
