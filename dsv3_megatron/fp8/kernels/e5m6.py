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
    words = empty(x, m, 3 * triton.cdiv(k, 8), torch.int32)
    scale = empty(x, m, triton.cdiv(k, TILE), torch.float32)
    grid = (triton.cdiv(m, _ROWS), scale.size(1))
    launch(_pack_e5m6_kernel, grid, x.contiguous(), words, scale, m, k, ROWS=_ROWS)
    packed = words.view(torch.uint8)
    return (packed[:, : 3 * triton.cdiv(k, 2)].contiguous() if k % 8 else packed), scale


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
    launch(_unpack_e5m6_kernel, grid, _words(packed), scale.contiguous(), out, m, k, ROWS=_ROWS)
    return out


def _words(packed: Tensor) -> Tensor:
    """The bytes as 32-bit words; a copy where a row does not fill its last three words, or starts between two."""
    packed = torch.nn.functional.pad(packed, [0, -packed.size(1) % 12]).contiguous()
    return (packed.clone() if packed.storage_offset() % 4 else packed).view(torch.int32)


@any_rows
def _pack_e5m6_kernel(x_ptr, words_ptr, scale_ptr, m, k, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    x = tl.load(x_ptr + at, mask=(rows[:, None] < m) & (columns[None, :] < k), other=0.0).to(tl.float32)
    amax = tl.max(finite_abs(x), axis=1)
    scale = ceil_to_power_of_two(tl.maximum(tl.div_rn(amax, 129024.0), SMALLEST_NORMAL))
    scale = tl.where(amax == 0.0, 1.0, scale)
    tl.store(scale_ptr + rows * tl.cdiv(k, 128) + tile, scale, mask=rows < m)
    # Eight neighbours apart, c[4i + 2j + l] from the last index to the first.
    codes = tl.reshape(_encode(x, scale[:, None]), (ROWS, 16, 2, 2, 2))
    even, odd = tl.split(codes)
    c04, c26 = tl.split(even)
    c15, c37 = tl.split(odd)
    c0, c4 = tl.split(c04)
    c1, c5 = tl.split(c15)
    c2, c6 = tl.split(c26)
    c3, c7 = tl.split(c37)
    at, inside = _groups(words_ptr, rows, tile, m, k)
    tl.store(at, c0 | (c1 << 12) | (c2 << 24), mask=inside)
    tl.store(at + 1, (c2 >> 8) | (c3 << 4) | (c4 << 16) | (c5 << 28), mask=inside)
    tl.store(at + 2, (c5 >> 4) | (c6 << 8) | (c7 << 20), mask=inside)


@any_rows
def _unpack_e5m6_kernel(words_ptr, scale_ptr, out_ptr, m, k, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    at, inside = _groups(words_ptr, rows, tile, m, k)
    low = tl.load(at, mask=inside, other=0)
    middle = tl.load(at + 1, mask=inside, other=0)
    high = tl.load(at + 2, mask=inside, other=0)
    # A right shift repeats the sign, which every mask of 12 bits or fewer cuts off.
    c0, c1 = low & 0xFFF, (low >> 12) & 0xFFF
    c2 = ((low >> 24) & 0xFF) | ((middle & 0xF) << 8)
    c3, c4 = (middle >> 4) & 0xFFF, (middle >> 16) & 0xFFF
    c5 = ((middle >> 28) & 0xF) | ((high & 0xFF) << 4)
    c6, c7 = (high >> 8) & 0xFFF, (high >> 20) & 0xFFF
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    codes = tl.reshape(tl.join(even, odd), (ROWS, 128))
    scale = tl.load(scale_ptr + rows * tl.cdiv(k, 128) + tile, mask=rows < m, other=0.0)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    tl.store(out_ptr + at, _decode(codes) * scale[:, None], mask=inside)


@triton.jit
def _groups(words_ptr, rows, tile, m, k):
    """Where the three words of each eight numbers of a tile begin, [rows, 16], and whether they exist."""
    group = tile * 16 + tl.arange(0, 16)
    per_row = tl.cdiv(k, 8)
    at = words_ptr + 3 * (rows[:, None].to(tl.int64) * per_row + group[None, :])
    return at, (rows[:, None] < m) & (group[None, :] < per_row)


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
