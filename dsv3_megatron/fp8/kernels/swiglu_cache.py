"""SwiGLU with its input kept in E4M3, on the GPU; `dsv3_megatron.fp8.swiglu` defines the results.

Unlike the kernels of `swiglu.py`, which quantise for the products around them, these hand bf16 to whatever Linear comes
before and after: Transformer Engine's, or any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_megatron.fp8.kernels.launch import TILE, any_rows, launch
from dsv3_megatron.fp8.kernels.numerics import finite_abs, sigmoid, tile_scale, to_e4m3
from dsv3_megatron.fp8.kernels.swiglu import checked_weights
from dsv3_megatron.fp8.kernels.tiles import check_matrix, empty
from dsv3_megatron.fp8.tiles import Quantized

__all__ = ["swiglu_and_cache", "swiglu_from_cache", "swiglu_gradients"]

_ROWS = 16


def swiglu_and_cache(u: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Quantized]:
    """As `dsv3_megatron.fp8.swiglu_and_cache`: the cache bit for bit, the output up to the rounding of exp."""
    m, width = check_matrix(u)
    if width % 2:
        raise ValueError(f"u of shape {(m, width)}: gate and up are halves of its columns")
    half, tiles = width // 2, triton.cdiv(width // 2, TILE)
    hidden = empty(u, m, half, u.dtype)
    q, scale = empty(u, m, width), empty(u, m, 2 * tiles, torch.float32)
    args = (u.contiguous(), checked_weights(u, weights), hidden, q, scale, m, half)
    launch(_swiglu_keep_kernel, _grid(m, tiles), *args, WEIGHTED=weights is not None, ROWS=_ROWS)
    return hidden, (q, scale)


def swiglu_from_cache(u: Quantized, weights: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """As `dsv3_megatron.fp8.swiglu_from_cache`, up to the rounding of exp."""
    m, half, tiles = _check_cache(u)
    hidden = empty(u[0], m, half, dtype)
    args = (u[0].contiguous(), u[1].contiguous(), checked_weights(u[0], weights), hidden, m, half)
    launch(_swiglu_again_kernel, _grid(m, tiles), *args, WEIGHTED=weights is not None, ROWS=_ROWS)
    return hidden


def swiglu_gradients(
    grad: Tensor, u: Quantized, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `dsv3_megatron.fp8.swiglu_gradients`, up to the rounding of exp."""
    m, half, tiles = _check_cache(u)
    if tuple(grad.shape) != (m, half):
        raise ValueError(f"grad of shape {tuple(grad.shape)}: u of {(m, 2 * half)} needs {(m, half)}")
    grad_u = empty(grad, m, 2 * half, grad.dtype)
    # Per tile of columns: summed in a fixed order, without atomics.
    grad_weights = empty(grad, m, tiles if weights is not None else 1, torch.float32)
    cache = (u[0].contiguous(), u[1].contiguous(), checked_weights(grad, weights))
    args = (grad.contiguous(), *cache, grad_u, grad_weights, m, half)
    launch(_swiglu_gradients_kernel, _grid(m, tiles), *args, WEIGHTED=weights is not None, ROWS=_ROWS)
    return grad_u, None if weights is None else grad_weights.sum(1, keepdim=True)


def _grid(m: int, tiles: int) -> tuple[int, int]:
    return triton.cdiv(m, _ROWS), tiles


def _check_cache(u: Quantized) -> tuple[int, int, int]:
    """Rows, columns of a half, tiles of a half."""
    q, scale = u
    m, width = check_matrix(q)
    tiles = triton.cdiv(width // 2, TILE)
    if width % 2 or tuple(scale.shape) != (m, 2 * tiles):
        raise ValueError(f"scale of shape {tuple(scale.shape)}: halves of {(m, width)} have {(m, 2 * tiles)}")
    return m, width // 2, tiles


@any_rows
def _swiglu_keep_kernel(
    u_ptr, weights_ptr, hidden_ptr, q_ptr, scale_ptr, m, half, WEIGHTED: tl.constexpr, ROWS: tl.constexpr
):
    rows, tile, columns, inside = _block(m, half, ROWS)
    at = rows[:, None].to(tl.int64) * (2 * half) + columns[None, :]
    gate = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
    hidden = gate * sigmoid(gate) * up
    if WEIGHTED:
        hidden *= tl.load(weights_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
    _store_hidden(hidden_ptr, hidden, rows, columns, half, inside)
    tiles = tl.cdiv(half, 128)
    scales = scale_ptr + rows * (2 * tiles) + tile
    scale = tile_scale(tl.max(finite_abs(gate), axis=1), 1e-4, False)
    tl.store(q_ptr + at, to_e4m3(gate, scale[:, None]), mask=inside)
    tl.store(scales, scale, mask=rows < m)
    scale = tile_scale(tl.max(finite_abs(up), axis=1), 1e-4, False)
    tl.store(q_ptr + at + half, to_e4m3(up, scale[:, None]), mask=inside)
    tl.store(scales + tiles, scale, mask=rows < m)


@any_rows
def _swiglu_again_kernel(
    q_ptr, scale_ptr, weights_ptr, hidden_ptr, m, half, WEIGHTED: tl.constexpr, ROWS: tl.constexpr
):
    rows, tile, columns, inside = _block(m, half, ROWS)
    gate, up = _cached(q_ptr, scale_ptr, rows, tile, columns, m, half, inside)
    hidden = gate * sigmoid(gate) * up
    if WEIGHTED:
        hidden *= tl.load(weights_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
    _store_hidden(hidden_ptr, hidden, rows, columns, half, inside)


@any_rows
def _swiglu_gradients_kernel(
    grad_ptr,
    q_ptr,
    scale_ptr,
    weights_ptr,
    grad_u_ptr,
    grad_weights_ptr,
    m,
    half,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, tile, columns, inside = _block(m, half, ROWS)
    gate, up = _cached(q_ptr, scale_ptr, rows, tile, columns, m, half, inside)
    at = rows[:, None].to(tl.int64) * half + columns[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    silu = gate * s
    if WEIGHTED:
        partial = tl.sum(grad * silu * up, axis=1)
        tl.store(grad_weights_ptr + rows * tl.cdiv(half, 128) + tile, partial, mask=rows < m)
        grad *= tl.load(weights_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
    at = grad_u_ptr + rows[:, None].to(tl.int64) * (2 * half) + columns[None, :]
    # silu' = sigmoid · (1 + gate · (1 − sigmoid))
    tl.store(at, (grad * up * (s + silu - silu * s)).to(grad_u_ptr.dtype.element_ty), mask=inside)
    tl.store(at + half, (grad * silu).to(grad_u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _block(m, half, ROWS: tl.constexpr):
    """Rows, tile and columns of this program in a half, and which of them exist."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    return rows, tile, columns, (rows[:, None] < m) & (columns[None, :] < half)


@triton.jit
def _cached(q_ptr, scale_ptr, rows, tile, columns, m, half, inside):
    """gate and up of a block, dequantised."""
    tiles = tl.cdiv(half, 128)
    at = q_ptr + rows[:, None].to(tl.int64) * (2 * half) + columns[None, :]
    scales = scale_ptr + rows * (2 * tiles) + tile
    gate_scale = tl.load(scales, mask=rows < m, other=0.0)
    up_scale = tl.load(scales + tiles, mask=rows < m, other=0.0)
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32) * gate_scale[:, None]
    up = tl.load(at + half, mask=inside, other=0.0).to(tl.float32) * up_scale[:, None]
    return gate, up


@triton.jit
def _store_hidden(hidden_ptr, hidden, rows, columns, half, inside):
    at = hidden_ptr + rows[:, None].to(tl.int64) * half + columns[None, :]
    tl.store(at, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
