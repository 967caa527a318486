"""Messages of FP8 dispatch on the GPU, one kernel each way; `dsv3_megatron.fp8.message` defines the format.

`dequantize` is the second half of it for numbers whose scales are apart: what DeepEP delivers, and what is cached.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_megatron.fp8.kernels.launch import TILE, any_rows, launch
from dsv3_megatron.fp8.kernels.numerics import finite_abs, tile_scale, to_e4m3
from dsv3_megatron.fp8.kernels.tiles import E4M3, check_matrix, empty, tile_rows

__all__ = ["decode_message", "dequantize", "encode_message"]

_ROWS = 32


def encode_message(x: Tensor, eps: float) -> Tensor:
    """As `dsv3_megatron.fp8.encode_message`: [M, K] → bytes [M, K + ⌈K/128⌉], bit for bit."""
    m, k = check_matrix(x, eps)
    message = empty(x, m, k + triton.cdiv(k, TILE), torch.uint8)
    grid = (triton.cdiv(m, _ROWS), triton.cdiv(k, TILE))
    args = (x.contiguous(), message.view(E4M3), message, m, k, message.size(1), eps)
    launch(_encode_message_kernel, grid, *args, ALIGNMENT=_alignment(message), ROWS=_ROWS)
    return message


def decode_message(message: Tensor, num_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `dsv3_megatron.fp8.decode_message`: bytes [M, K + ⌈K/128⌉] → [M, K], bit for bit; allocates nothing else."""
    m, width = check_matrix(message)
    if width != num_columns + triton.cdiv(num_columns, TILE):
        raise ValueError(f"num_columns={num_columns}: a message has one byte more per {TILE}, not {width}")
    message = message.contiguous()
    out = empty(message, m, num_columns, dtype)
    grid = (triton.cdiv(m, _ROWS), triton.cdiv(num_columns, TILE))
    args = (message.view(E4M3), message, out, m, num_columns, width, width)
    launch(_dequantize_kernel, grid, *args, TILE_ROWS=0, ALIGNMENT=_alignment(message), ROWS=_ROWS)
    return out


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `dsv3_megatron.fp8.dequantize` for 1×128 and 128×128 tiles: q [M, K] → [M, K] of dtype.

    Raises:
        ValueError: the scale's shape is that of neither.
    """
    m, k = check_matrix(q)
    options = {"TILE_ROWS": tile_rows("q", (q, scale), k), "ALIGNMENT": _alignment(q), "ROWS": _ROWS}
    out = empty(q, m, k, dtype)
    grid = (triton.cdiv(m, _ROWS), triton.cdiv(k, TILE))
    args = (q.contiguous(), scale.contiguous(), out, m, k, k, triton.cdiv(k, TILE))
    launch(_dequantize_kernel, grid, *args, **options)
    return out


def _alignment(x: Tensor) -> int:
    """Bytes that the beginnings of all rows are multiples of, up to 16: how wide loads may be."""
    return math.gcd(x.size(1), 16)


@any_rows
def _encode_message_kernel(
    x_ptr, q_ptr, exponent_ptr, m, k, width, eps, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * k + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    scale = tile_scale(tl.max(finite_abs(x), axis=1), eps, True)
    start = tl.multiple_of(rows.to(tl.int64) * width, ALIGNMENT)
    tl.store(q_ptr + start[:, None] + columns[None, :], to_e4m3(x, scale[:, None]), mask=inside)
    exponent = scale.to(tl.int32, bitcast=True) >> 23
    tl.store(exponent_ptr + start + k + tile, exponent.to(tl.uint8), mask=rows < m)


@any_rows
def _dequantize_kernel(
    q_ptr,
    scale_ptr,
    out_ptr,
    m,
    k,
    q_width,
    scale_width,
    TILE_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of q are q_width apart. TILE_ROWS of them share fp32 scales; 0: a row's are the bytes behind it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    start = tl.multiple_of(rows.to(tl.int64) * q_width, ALIGNMENT)
    q = tl.load(q_ptr + start[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if TILE_ROWS == 0:
        exponent = tl.load(scale_ptr + start + k + tile, mask=rows < m, other=0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(scale_ptr + rows // TILE_ROWS * scale_width + tile, mask=rows < m, other=0.0)
    at = out_ptr + rows[:, None].to(tl.int64) * k + columns[None, :]
    tl.store(at, (q * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
