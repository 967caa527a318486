"""Every FP8 kernel once, on ragged shapes of a few tiles: what compute-sanitizer watches.

python -m tests.gpu.tiny_kernels            each kernel, "done" at the end
python -m tests.gpu.tiny_kernels planted    a kernel that writes past its tensor, which must be found
"""

import os
import sys
from typing import Any

import torch
import triton
import triton.language as tl

from dsv3_megatron import fp8
from tests.gpu import device
from tests.gpu.device import DEVICE

# Arguments that have no place in the order.
BY_NAME: dict[str, dict[str, Any]] = {"swiglu_from_cache": {"dtype": torch.float32}}


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of one call of each function of `dsv3_megatron.fp8.kernels`."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 300, generator=generator) for rows in (131, 7))
    u = torch.randn(5, 256, generator=generator)
    weights = torch.rand(5, 1, generator=generator)
    half = u[:, :128].contiguous()
    a, b, tiles = fp8.quantize_tile(x), fp8.quantize_block(w), fp8.quantize_tile(u)
    found: dict[str, tuple[Any, ...]] = {
        "quantize_tile": (x,),
        "quantize_tile_t": (x,),
        "quantize_block": (x,),
        "requantize_transposed": a,
        "pack_e5m6": (x,),
        "unpack_e5m6": (*fp8.pack_e5m6(x), 300),
        "gemm_nt": (a, b),
        "grouped_gemm_nt": (a, [b, b], [130, 1]),
        "swiglu_quantize_tile": (u, weights),
        "swiglu_quantize_tile_backward": (half, tiles),
    }
    cached = fp8.swiglu_and_cache(u, weights)[1]
    return found | {
        "dequantize": a,
        "encode_message": (x, 1e-4),
        "decode_message": (fp8.encode_message(x, 1e-4), 300),
        "swiglu_and_cache": (u, weights),
        "swiglu_from_cache": (cached, weights),
        "swiglu_gradients": (half, cached, weights),
    }


def every_kernel() -> list[str]:
    """Names of the kernels that ran."""
    found = calls()
    with device.kernels() as call:
        for name, args in found.items():
            call(name, *args, **BY_NAME.get(name, {}))
    return list(found)


@triton.jit
def _past_the_end(x_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + size + at, at.to(tl.float32))


def planted() -> None:
    """512 MiB past a tensor of 512 bytes lies nothing that was allocated."""
    x = torch.zeros(128, device=DEVICE)
    _past_the_end[(1,)](x, 1 << 27, BLOCK=128)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if device.REHEARSAL:
        os.environ["TRITON_INTERPRET"] = "1"  # the interpreter's process imports this module first
    if sys.argv[1:] == ["planted"]:
        planted()
    else:
        print("ran", *every_kernel())
    print("done")
