"""Run unmodified Megatron-core and `megatron.training.pretrain` on CPU with gloo.

    torchrun --nproc-per-node 4 -m dsv3_megatron.cpu pretrain_gpt.py <Megatron arguments>

or `dsv3_megatron.cpu.activate()` before Megatron is imported. Nothing happens on import of this package, and
activation is refused in a process that sees a GPU. `replacements.TABLE` lists
every replacement with its reason.
"""

import os
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3_megatron.cpu.record import Recorder

# Megatron turns fused kernels on by default; none of them exists on CPU.
CPU_FLAGS: tuple[str, ...] = (
    "--transformer-impl",
    "local",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
)

_active = False
_pretends = False


def pretend_gpu(capability: tuple[int, int] = (9, 0), memory_gb: float = 80, allow_te: bool = True) -> None:
    """Answer Megatron's questions about the device as a process with such a GPU would; nothing is computed.

    For checks of a GPU job on a machine without one. The CPU runtime is not active then: arguments are not refused for
    being a GPU's, and whatever asks `is_active()` decides as it does on a GPU. Call it before Megatron is imported; a
    second call changes the GPU.

    Raises:
        RuntimeError: a GPU is visible, Megatron was imported before, or the CPU runtime is active.
    """
    global _pretends
    if _active:
        raise RuntimeError(
            "dsv3_megatron.cpu is active: this process runs on CPU and cannot stand for a GPU's"
        )
    if not _pretends:
        _install(allow_te, pretend=True)
        _pretends = True
    from dsv3_megatron.cpu import devices

    devices.gpu.major, devices.gpu.minor = capability
    devices.gpu.total_memory = int(memory_gb * 1e9)


def activate(allow_te: bool = False) -> None:
    """Replace what Megatron takes from CUDA and NCCL by CPU and gloo stand-ins, in this process, for good.

    Idempotent. Call it before Megatron is imported. With `allow_te`, an installed Transformer Engine stays
    importable (its modules can be constructed; no TE kernel runs); otherwise importing it raises
    `ModuleNotFoundError`, as on a machine without it.

    Raises:
        RuntimeError: a GPU is visible, or Megatron was imported before.
        ReplacementError: something to be replaced does not exist in the installed version.
    """
    global _active
    if _active:
        if allow_te and sys.modules.get("transformer_engine", False) is None:
            raise RuntimeError(
                "dsv3_megatron.cpu is active already, without Transformer Engine: activate(allow_te=True) must come "
                "first."
            )
        return
    if _pretends:
        raise RuntimeError(
            "dsv3_megatron.cpu.pretend_gpu() was called: this process stands for one with a GPU"
        )
    _install(allow_te, pretend=False)
    _active = True


def _install(allow_te: bool, pretend: bool) -> None:
    # torch.compile asks Triton about the GPU; the variable is read when torch._dynamo is first imported.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if not pretend:
        # Asserted by Megatron's argument validation for tensor and context parallelism.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    if torch.cuda.is_available():
        raise RuntimeError(
            "dsv3_megatron.cpu.activate(): a GPU is visible, and the CPU stand-ins are never used with one. "
            "Run without `-m dsv3_megatron.cpu` / `--device cpu`, or hide the GPU: CUDA_VISIBLE_DEVICES=''."
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "dsv3_megatron.cpu.activate() was called after Megatron had been imported, which bound names of "
            "torch.cuda already. Call it first."
        )
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True
    from dsv3_megatron.cpu import replacements

    replacements.install(allow_te=allow_te, pretend=pretend)


def is_active() -> bool:
    """Whether `activate()` has been called in this process."""
    return _active


def record_streams() -> "AbstractContextManager[Recorder]":
    """See `record.record_streams`.

    Raises:
        RuntimeError: the CPU runtime is not active, or a record is being kept already.
    """
    from dsv3_megatron.cpu import record

    if not _active:
        raise RuntimeError("record_streams() needs dsv3_megatron.cpu.activate()")
    return record.record_streams()


def behave_like_nccl(limit_s: float | None = None) -> None:
    """Let gloo behave as NCCL does where that can hang a job, in this process, for good; see `like_nccl`.

    Args:
        limit_s: what waits for longer, and would hang on NCCL, raises; default `like_nccl.LIMIT_S`.

    Raises:
        RuntimeError: the CPU runtime is not active.
    """
    if not _active:
        raise RuntimeError("behave_like_nccl() needs dsv3_megatron.cpu.activate()")
    from dsv3_megatron.cpu import like_nccl

    like_nccl.install(like_nccl.LIMIT_S if limit_s is None else limit_s)


def is_like_nccl() -> bool:
    """Whether `behave_like_nccl()` has been called in this process."""
    if not _active:
        return False
    from dsv3_megatron.cpu import like_nccl

    return like_nccl.is_installed()


def reset() -> None:
    """Forget what the stand-ins keep between runs: the current stream."""
    if _active:
        from dsv3_megatron.cpu import streams

        streams.reset()
