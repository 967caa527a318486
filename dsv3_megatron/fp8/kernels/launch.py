"""How every kernel here is started: on a CUDA device, in Triton's interpreter, or not at all but compiled for one.

The functions of this package describe a launch once, sizes and all; `compile.py` calls the same functions on
tensors of the meta device, so that what it compiles is exactly what a GPU would run.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

TILE = 128

# Decorates a kernel in which the number of rows, m, is no part of an address: tokens of an expert are any number, and
# without this Triton would compile once for multiples of 16 and once for others.
any_rows = triton.jit(do_not_specialize=["m"])


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments in order: tensors and numbers; `constants` are its compile-time arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[torch.Tensor | int | float, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1

    @property
    def name(self) -> str:
        """The kernel's, for people."""
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    def tensors(self) -> list[torch.Tensor]:
        return [a for a in self.args if isinstance(a, torch.Tensor)]


_recorder: Callable[[Launch], None] | None = None


@contextmanager
def recording(record: Callable[[Launch], None]) -> Iterator[None]:
    """Within, launches are handed to `record` instead of being run; all their tensors must be on the meta device."""
    global _recorder
    _recorder = record
    try:
        yield
    finally:
        _recorder = None


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were decorated; `triton.knobs` came with Triton 3.4."""
    knobs = getattr(triton, "knobs", None)
    if knobs is None:
        return os.environ.get("TRITON_INTERPRET") == "1"
    return bool(knobs.runtime.interpret)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: torch.Tensor | int | float,
    num_warps: int = 4,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Start `kernel` on the device of its tensors; nothing is started for an empty grid.

    Raises:
        RuntimeError: the tensors are not on one CUDA device. CPU tensors are accepted only under
            TRITON_INTERPRET=1, meta tensors only while `recording`.
    """
    planned = Launch(kernel, grid, args, constants, num_warps, num_stages)
    devices = {t.device for t in planned.tensors()}
    kinds = {d.type for d in devices}
    if _recorder is not None and kinds == {"meta"}:
        _recorder(planned)
        return
    interpreted = is_interpreted()
    if len(devices) != 1 or kinds != {"cpu" if interpreted else "cuda"}:
        raise RuntimeError(
            f"{kernel.__name__}: the FP8 kernels run on one CUDA device, the tensors are on "
            f"{sorted(map(str, devices))}. Without a GPU use the reference of the same name in dsv3_megatron.fp8."
        )
    if 0 in grid:
        return
    with torch.cuda.device_of(planned.tensors()[0]):  # Triton launches on the current device
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
