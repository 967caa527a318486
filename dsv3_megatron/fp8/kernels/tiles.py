"""Quantisation by tiles and blocks on the GPU; `dsv3_megatron.fp8.tiles` defines the results.

Matrices are row-major; a program handles a strip or a block of whole tiles, reads it once and writes it once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_megatron.fp8.kernels.launch import TILE, any_rows, launch
from dsv3_megatron.fp8.kernels.numerics import finite_abs, tile_scale, to_e4m3
from dsv3_megatron.fp8.tiles import Quantized

__all__ = ["quantize_block", "quantize_tile", "quantize_tile_t", "requantize_transposed"]

E4M3 = torch.float8_e4m3fn
_ROWS = 32  # of a program of quantize_tile
_COLUMNS = 64  # of a program of quantize_tile_t


def quantize_tile(x: Tensor, *, eps: float = 1e-4, pow2: bool = False) -> Quantized:
    """As `dsv3_megatron.fp8.quantize_tile`: [M, K] → q [M, K] E4M3, scale [M, ⌈K/128⌉] fp32, bit for bit.

    x is bf16, fp16 or fp32 on a CUDA device.
    """
    m, k = check_matrix(x, eps)
    q, scale = empty(x, m, k), empty(x, m, triton.cdiv(k, TILE), torch.float32)
    grid = (triton.cdiv(m, _ROWS), scale.size(1))
    launch(_quantize_tile_kernel, grid, x.contiguous(), q, scale, m, k, eps, POW2=pow2, ROWS=_ROWS)
    return q, scale


def quantize_tile_t(x: Tensor, *, eps: float = 1e-4, pow2: bool = False) -> Quantized:
    """As `dsv3_megatron.fp8.quantize_tile_t`: [M, K] → q [M, K] E4M3, scale [⌈M/128⌉, K] fp32, bit for bit."""
    m, k = check_matrix(x, eps)
    q, scale = empty(x, m, k), empty(x, triton.cdiv(m, TILE), k, torch.float32)
    grid = (scale.size(0), triton.cdiv(k, _COLUMNS))
    launch(_quantize_tile_t_kernel, grid, x.contiguous(), q, scale, m, k, eps, POW2=pow2, COLUMNS=_COLUMNS)
    return q, scale


def quantize_block(w: Tensor, *, eps: float = 1e-4, pow2: bool = False) -> Quantized:
    """As `dsv3_megatron.fp8.quantize_block`: [M, K] → q [M, K] E4M3, scale [⌈M/128⌉, ⌈K/128⌉] fp32, bit for bit."""
    m, k = check_matrix(w, eps)
    q, scale = empty(w, m, k), empty(w, triton.cdiv(m, TILE), triton.cdiv(k, TILE), torch.float32)
    grid = (scale.size(0), scale.size(1))
    launch(_quantize_block_kernel, grid, w.contiguous(), q, scale, m, k, eps, num_warps=8, POW2=pow2)
    return q, scale


def requantize_transposed(q: Tensor, scale: Tensor, *, eps: float = 1e-4, pow2: bool = False) -> Quantized:
    """As `dsv3_megatron.fp8.requantize_transposed`: q [M, K] → q [K, M], scale [K, ⌈M/128⌉], bit for bit."""
    m, k = check_matrix(q, eps)
    check_scale(q, scale)
    out, out_scale = empty(q, k, m), empty(q, k, triton.cdiv(m, TILE), torch.float32)
    grid = (triton.cdiv(m, TILE), triton.cdiv(k, TILE))
    args = (q.contiguous(), scale.contiguous(), out, out_scale, m, k, eps)
    launch(_requantize_transposed_kernel, grid, *args, num_warps=8, POW2=pow2)
    return out, out_scale


def check_matrix(x: Tensor, eps: float = 0.0) -> tuple[int, int]:
    """The shape of a matrix.

    Raises:
        ValueError: as the reference: x is not a matrix, or eps is negative.
    """
    if x.dim() != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(x.shape)}")
    if eps < 0:
        raise ValueError(f"eps={eps}: the floor of amax must not be negative")
    return x.size(0), x.size(1)


def check_scale(q: Tensor, scale: Tensor) -> None:
    """Raises ValueError unless scale belongs to the 1×128 tiles of q."""
    expected = (q.size(0), triton.cdiv(q.size(1), TILE))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)}: 1×{TILE} tiles of {tuple(q.shape)} have {expected}"
        )


def tile_rows(name: str, x: Quantized, k: int) -> int:
    """Rows that share a scale: 1 or 128.

    Raises:
        ValueError: not E4M3, the inner dimension is not k, or the scale's shape is that of neither.
    """
    q, scale = x
    if check_matrix(q)[1] != k:
        raise ValueError(f"inner dimensions differ: {name} is {tuple(q.shape)}, K is {k}")
    if (q.dtype, scale.dtype) != (E4M3, torch.float32):
        raise ValueError(f"{name} is {q.dtype} with scales in {scale.dtype}: use {E4M3} and torch.float32")
    tiles = triton.cdiv(k, TILE)
    for rows in (1, TILE):
        if tuple(scale.shape) == (triton.cdiv(q.size(0), rows), tiles):
            return rows
    raise ValueError(
        f"{name}'s scale has shape {tuple(scale.shape)}: {tuple(q.shape)} needs one per 1×{TILE} or {TILE}×{TILE} tile"
    )


def empty(like: Tensor, rows: int, columns: int, dtype: torch.dtype = E4M3) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=like.device)


@any_rows
def _quantize_tile_kernel(x_ptr, q_ptr, scale_ptr, m, k, eps, POW2: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tile_scale(tl.max(finite_abs(x), axis=1), eps, POW2)
    tl.store(q_ptr + at, to_e4m3(x, scale[:, None]), mask=inside)
    tl.store(scale_ptr + rows * tl.cdiv(k, 128) + tile, scale, mask=rows < m)


@any_rows
def _quantize_tile_t_kernel(x_ptr, q_ptr, scale_ptr, m, k, eps, POW2: tl.constexpr, COLUMNS: tl.constexpr):
    tile = tl.program_id(0)
    rows = tile * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tile_scale(tl.max(finite_abs(x), axis=0), eps, POW2)
    tl.store(q_ptr + at, to_e4m3(x, scale[None, :]), mask=inside)
    tl.store(scale_ptr + tile * k + columns, scale, mask=columns < k)


@any_rows
def _quantize_block_kernel(x_ptr, q_ptr, scale_ptr, m, k, eps, POW2: tl.constexpr):
    rows = tl.program_id(0) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tile_scale(tl.max(tl.max(finite_abs(x), axis=1), axis=0), eps, POW2)
    tl.store(q_ptr + at, to_e4m3(x, scale), mask=inside)
    tl.store(scale_ptr + tl.program_id(0) * tl.cdiv(k, 128) + tl.program_id(1), scale)


@triton.jit
def _requantize_transposed_kernel(q_ptr, scale_ptr, out_ptr, out_scale_ptr, m, k, eps, POW2: tl.constexpr):
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows = row_tile * 128 + tl.arange(0, 128)
    columns = column_tile * 128 + tl.arange(0, 128)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + rows * tl.cdiv(k, 128) + column_tile, mask=rows < m, other=0.0)
    x = q * scale[:, None]
    out_scale = tile_scale(tl.max(finite_abs(x), axis=0), eps, POW2)
    at = columns[:, None].to(tl.int64) * m + rows[None, :]
    q = tl.trans(to_e4m3(x, out_scale[None, :]))
    tl.store(out_ptr + at, q, mask=(columns[:, None] < k) & (rows[None, :] < m))
    tl.store(out_scale_ptr + columns * tl.cdiv(m, 128) + row_tile, out_scale, mask=columns < k)
