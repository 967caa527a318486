"""The kernels run by Triton's interpreter, in a process of their own.

TRITON_INTERPRET decides when a kernel is decorated, for good: the tests' own process must not have it, or nothing
could be compiled there.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np


class Interpreter:
    """`interpreter("quantize_tile", x, pow2=True)` calls that function of `dsv3_megatron.fp8.kernels`.

    Args:
        exact_casts: convert as the hardware does (see `exact_convert`); False leaves Triton's own conversions.
    """

    def __init__(self, exact_casts: bool = True) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _prepare, (exact_casts,))

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._pool.submit(_call, name, args, kwargs).result(timeout=300)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _prepare(exact_casts: bool) -> None:
    """Runs first in the process: nothing has imported triton there yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton.runtime.interpreter as interpreter

    torch.set_num_threads(1)
    _accept_loop_bounds(interpreter)
    if exact_casts:
        if not hasattr(interpreter, "_convert_float"):
            raise RuntimeError("this Triton's interpreter has no _convert_float: see how it rounds now")
        interpreter._convert_float = exact_convert


def _accept_loop_bounds(interpreter: Any) -> None:
    """Triton before 3.8 makes an int of an array of one number, which numpy from 2.4 on refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> Any:
        result = patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return result

    interpreter._patch_lang_tensor = patch_and_mend


def _call(name: str, args: tuple, kwargs: dict) -> Any:
    from dsv3_megatron.fp8 import kernels

    return getattr(kernels, name)(*args, **kwargs)


def exact_convert(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """Bits of `data` in another float format, rounded to nearest even, NaN kept, as sm_90's `cvt` and torch do.

    Triton 3.8's interpreter rounds to E4M3 half away from zero, without the carry into the exponent, truncates to
    bf16 and reads E4M3's NaN as 480. (`cvt` saturates ±inf where torch makes NaN; the kernels convert none.)
    """
    import torch

    formats = {
        "fp8e4nv": (torch.float8_e4m3fn, np.uint8),
        "bf16": (torch.bfloat16, np.uint16),
        "fp16": (torch.float16, np.uint16),
        "fp32": (torch.float32, np.uint32),
    }
    (dtype, bits), (target_dtype, target_bits) = formats[source.name], formats[target.name]
    values = torch.from_numpy(np.ascontiguousarray(data).view(bits).copy()).view(dtype)
    return values.to(target_dtype).view(torch.uint8).numpy().view(target_bits).reshape(data.shape)
