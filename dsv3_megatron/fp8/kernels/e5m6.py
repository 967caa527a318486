"""E5M6 on the GPU; `dsv3_megatron.fp8.e5m6` defines layout, rounding and scales."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_megatron.fp8.kernels.launch import TILE, any_rows, launch
from dsv3_megatron.fp8.kernels.numerics import SMALLEST_NORMAL, ceil_to_power_of_two, finite_abs, is_finite
from dsv3_megatron.fp8.kernels.tiles import check_matrix, empty

__all__ = ["pack_e5m6", "unpack_e5m6"]

_ROWS = 16


def pack_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `dsv3_megatron.fp8.pack_e5m6`: [M, K] → bytes [M, 3·⌈K/2⌉] and scale [M, ⌈K/128⌉], bit for bit."""
    m, k = check_matrix(x)
    packed = empty(x, m, 3 * triton.cdiv(k, 2), torch.uint8)
    scale = empty(x, m, triton.cdiv(k, TILE), torch.float32)
    grid = (triton.cdiv(m, _ROWS), scale.size(1))
    launch(_pack_e5m6_kernel, grid, x.contiguous(), packed, scale, m, k, ROWS=_ROWS)
    return packed, scale


def unpack_e5m6(
    packed: Tensor, scale: Tensor, num_columns: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """As `dsv3_megatron.fp8.unpack_e5m6`: the [M, K] numbers; `num_columns` is K, needed where K is odd."""
    m, width = check_matrix(packed)
    if width % 3:
        raise ValueError(f"packed has {width} columns: two numbers fill three bytes")
    k = width // 3 * 2 if num_columns is None else num_columns
    if triton.cdiv(k, 2) * 3 != width or tuple(scale.shape) != (m, triton.cdiv(k, TILE)):
        raise ValueError(
            f"num_columns={k}: packed {tuple(packed.shape)}, scale {tuple(scale.shape)} do not fit"
        )
    out = empty(packed, m, k, dtype)
    grid = (triton.cdiv(m, _ROWS), scale.size(1))
    launch(_unpack_e5m6_kernel, grid, packed.contiguous(), scale.contiguous(), out, m, k, ROWS=_ROWS)
    return out


@any_rows
def _pack_e5m6_kernel(x_ptr, packed_ptr, scale_ptr, m, k, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    pairs = tile * 64 + tl.arange(0, 64)
    columns = tile * 128 + tl.arange(0, 128)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    x = tl.load(x_ptr + at, mask=(rows[:, None] < m) & (columns[None, :] < k), other=0.0).to(tl.float32)
    amax = tl.max(finite_abs(x), axis=1)
    scale = ceil_to_power_of_two(tl.maximum(tl.div_rn(amax, 129024.0), SMALLEST_NORMAL))
    scale = tl.where(amax == 0.0, 1.0, scale)
    a, b = tl.split(tl.reshape(_encode(x, scale[:, None]), (ROWS, 64, 2)))
    packed_columns = 3 * tl.cdiv(k, 2)
    at = packed_ptr + rows[:, None].to(tl.int64) * packed_columns + 3 * pairs[None, :]
    inside = (rows[:, None] < m) & (2 * pairs[None, :] < k)
    tl.store(at, (a & 255).to(tl.uint8), mask=inside)
    tl.store(at + 1, ((a >> 8) | ((b & 15) << 4)).to(tl.uint8), mask=inside)
    tl.store(at + 2, (b >> 4).to(tl.uint8), mask=inside)
    tl.store(scale_ptr + rows * tl.cdiv(k, 128) + tile, scale, mask=rows < m)


@any_rows
def _unpack_e5m6_kernel(packed_ptr, scale_ptr, out_ptr, m, k, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    pairs = tile * 64 + tl.arange(0, 64)
    columns = tile * 128 + tl.arange(0, 128)
    at = packed_ptr + rows[:, None].to(tl.int64) * (3 * tl.cdiv(k, 2)) + 3 * pairs[None, :]
    inside = (rows[:, None] < m) & (2 * pairs[None, :] < k)
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    middle = tl.load(at + 1, mask=inside, other=0).to(tl.int32)
    high = tl.load(at + 2, mask=inside, other=0).to(tl.int32)
    a = low | ((middle & 15) << 8)
    b = (middle >> 4) | (high << 4)
    scale = tl.load(scale_ptr + rows * tl.cdiv(k, 128) + tile, mask=rows < m, other=0.0)
    x = tl.reshape(tl.join(_decode(a), _decode(b)), (ROWS, 128)) * scale[:, None]
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    tl.store(out_ptr + at, x, mask=(rows[:, None] < m) & (columns[None, :] < k))


@triton.jit
def _encode(x, scale):
    """12-bit codes, int32, of x / scale, rounded to nearest even."""
    x, scale = tl.broadcast(x, scale)
    magnitude = tl.abs(tl.where(is_finite(x), tl.div_rn(x, scale), 0.0))
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, -14)
    # |x| in units of the last mantissa bit: at most 128, so that adding 2^23 rounds to an integer in the low bits.
    units = magnitude * ((6 - exponent + 127) << 23).to(tl.float32, bitcast=True)
    units = (units + 8388608.0).to(tl.int32, bitcast=True) & 0x7FFFFF
    code = tl.minimum(((exponent + 15) << 6) + units - 64, 0x7FE)
    code = tl.where(is_finite(x), code, 0x7FF)
    negative = x.to(tl.int32, bitcast=True) < 0
    return tl.where(negative, code | 0x800, code)


@triton.jit
def _decode(code):
    """fp32 numbers of 12-bit codes."""
    exponent, mantissa = (code >> 6) & 31, code & 63
    normal = ((exponent + (127 - 15)) << 23) | (mantissa << 17)
    subnormal = (mantissa.to(tl.float32) * (2.0**-20)).to(tl.int32, bitcast=True)
    bits = tl.where(exponent > 0, normal, subnormal)
    bits = tl.where((code & 0x7FF) == 0x7FF, 0x7FC00000, bits) | ((code >> 11) << 31)
    return bits.to(tl.float32, bitcast=True)
