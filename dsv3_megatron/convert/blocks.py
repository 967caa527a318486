"""FP8 weights of the release in 128×128 blocks, computed a few rows of blocks at a time to bound the memory."""

import torch
from torch import Tensor

from dsv3_megatron.fp8.tiles import TILE, dequantize, quantize_block, quantize_with_scale

__all__ = ["dequantized", "quantized", "restored", "scale_shape"]

_ELEMENTS = 1 << 22  # of one step: 16 MiB of fp32


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `weight_scale_inv` for a weight [out, in]: blocks in each direction, the last may be smaller."""
    return tuple(-(-size // TILE) for size in shape)


def dequantized(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q · scale, computed in fp32, as `dtype`: q [out, in] E4M3, scale fp32 [⌈out/128⌉, ⌈in/128⌉]."""
    result = torch.empty(q.shape, dtype=dtype)
    for rows, blocks in _steps(q.shape):
        result[rows] = dequantize(q[rows], scale[blocks])
    return result


def quantized(weight: Tensor, powers_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(E4M3, scale) of a weight [out, in], with the largest absolute value of each block at 448.

    An element is off by at most 2⁻⁴ of itself, or 2⁻¹⁰ of its block's scale where that is more. With `powers_of_two`
    scales are rounded up to one, so that the largest value is above 224.
    """
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(scale_shape(tuple(weight.shape)))
    for rows, blocks in _steps(weight.shape):
        q[rows], scale[blocks] = quantize_block(weight[rows], eps=0.0, pow2=powers_of_two)
    return q, scale


def restored(weight: Tensor, scale: Tensor) -> Tensor | None:
    """The E4M3 numbers that `dequantized` made this weight of with this scale; None if it has changed since."""
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for rows, blocks in _steps(weight.shape):
        q[rows] = quantize_with_scale(weight[rows], scale[blocks])
        if not torch.equal(dequantize(q[rows], scale[blocks]).to(weight.dtype), weight[rows]):
            return None
    return q


def _steps(shape: torch.Size) -> list[tuple[slice, slice]]:
    """(rows, rows of blocks) of each step."""
    height = max(1, _ELEMENTS // max(1, shape[1] * TILE))
    tiles = -(-shape[0] // TILE)
    return [
        (
            slice(start * TILE, min(shape[0], (start + height) * TILE)),
            slice(start, min(tiles, start + height)),
        )
        for start in range(0, tiles, height)
    ]
