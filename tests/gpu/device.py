"""What the GPU tests run on: a GPU, or in a rehearsal (`run.sh STAGE --cpu-rehearsal`) what stands in for it on CPU.

A rehearsal goes through the same code: kernels in Triton's interpreter, the trainer with `--device cpu`, gloo for NCCL,
the reference backend for Transformer Engine, sizes that end in seconds. What it measures is not reported as a GPU's.
"""

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

REHEARSAL = os.environ.get("DSV3_TEST_DEVICE") == "rehearsal"
DEVICE = "cpu" if REHEARSAL else "cuda"


def sizes[T](on_gpu: T, in_rehearsal: T) -> T:
    """The first on a GPU, the second in a rehearsal."""
    return in_rehearsal if REHEARSAL else on_gpu


def num_gpus() -> int:
    """GPUs that are visible; in a rehearsal as many processes as this machine should start (DSV3_REHEARSED_GPUS)."""
    return int(os.environ.get("DSV3_REHEARSED_GPUS", "2")) if REHEARSAL else torch.cuda.device_count()


def needs_gpus(count: int) -> None:
    if num_gpus() < count:
        pytest.skip(f"needs {count} GPUs, {num_gpus()} are visible")


def needs_te() -> None:
    """Skip without Transformer Engine. In a rehearsal nothing is skipped: the reference backend stands in for it."""
    if not REHEARSAL and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")


def te_impl() -> str:
    """`--transformer-impl` for Transformer Engine."""
    return sizes("transformer_engine", "local")


@functools.cache
def _interpreter() -> Any:
    from tests.fp8.kernels.interpreter import Interpreter

    return Interpreter()


@contextmanager
def kernels() -> Iterator[Callable[..., Any]]:
    """`call(name, *args)` for functions of `dsv3_megatron.fp8.kernels`: results on the CPU, where references are."""
    yield _interpreter() if REHEARSAL else on_device


def on_device(name: str, *args: Any, **kwargs: Any) -> Any:
    from dsv3_megatron.fp8 import kernels as package

    return moved(getattr(package, name)(*moved(args, "cuda"), **kwargs), "cpu")


def moved(value: Any, device: str) -> Any:
    """value with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(v, device) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    return value


def milliseconds(function: Callable[[], Any]) -> float:
    """Median time of a call: on the GPU after a warm-up, with an L2 cache that others have filled."""
    if not REHEARSAL:
        from triton.testing import do_bench

        return float(do_bench(function, return_mode="median"))
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def gpu_name() -> str:
    """As the driver names it, "CPU" in a rehearsal."""
    return "CPU" if REHEARSAL else torch.cuda.get_device_name(0)
