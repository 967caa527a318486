"""SwiGLU fused with the quantisation of its result, and its backward; `swiglu_reference.py` defines the results."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_megatron.fp8.kernels.launch import TILE, any_rows, launch
from dsv3_megatron.fp8.kernels.numerics import finite_abs, sigmoid, tile_scale, to_e4m3
from dsv3_megatron.fp8.kernels.swiglu_reference import SwigluGradients
from dsv3_megatron.fp8.kernels.tiles import check_matrix, check_scale, empty
from dsv3_megatron.fp8.tiles import Quantized

__all__ = ["swiglu_quantize_tile", "swiglu_quantize_tile_backward"]

_ROWS = 16  # of a program of the forward kernel
_STRIP = {"ROWS": 16, "num_warps": 8}  # of the backward kernel


def swiglu_quantize_tile(
    u: Tensor, weights: Tensor | None = None, *, eps: float = 1e-4, pow2: bool = False
) -> Quantized:
    """As `swiglu_reference.swiglu_quantize_tile`, up to the rounding of exp.

    Raises:
        ValueError: u is not [M, 2H], weights are not [M, 1], or eps is negative.
    """
    m, width = check_matrix(u, eps)
    if width % 2:
        raise ValueError(f"u of shape {(m, width)}: gate and up are halves of its columns")
    q, scale = empty(u, m, width // 2), empty(u, m, triton.cdiv(width // 2, TILE), torch.float32)
    grid = (triton.cdiv(m, _ROWS), scale.size(1))
    args = (u.contiguous(), checked_weights(u, weights), q, scale, m, width // 2, eps)
    launch(_swiglu_kernel, grid, *args, WEIGHTED=weights is not None, POW2=pow2, ROWS=_ROWS)
    return q, scale


def swiglu_quantize_tile_backward(
    grad: Tensor,
    u: Quantized,
    weights: Tensor | None = None,
    *,
    eps: float = 1e-4,
    grad_eps: float = 0.0,
    pow2: bool = False,
) -> SwigluGradients:
    """As `swiglu_reference.swiglu_quantize_tile_backward`, up to the rounding of exp; H must be a multiple of 128.

    Raises:
        ValueError: shapes do not fit, H is no multiple of 128, or a floor is negative.
    """
    m, width = check_matrix(grad, min(eps, grad_eps))
    if width % TILE:
        raise ValueError(f"grad has {width} columns: the fused backward needs a multiple of {TILE}")
    if tuple(u[0].shape) != (m, 2 * width):
        raise ValueError(f"u of shape {tuple(u[0].shape)}: grad of {(m, width)} needs {(m, 2 * width)}")
    check_scale(*u)
    fp32, tiles, row_tiles = torch.float32, width // TILE, triton.cdiv(m, TILE)
    grad_u = empty(grad, m, 2 * width), empty(grad, m, 2 * tiles, fp32)
    grad_u_t = empty(grad, 2 * width, m), empty(grad, 2 * width, row_tiles, fp32)
    hidden_t = empty(grad, width, m), empty(grad, width, row_tiles, fp32)
    grad_weights = empty(
        grad, m, tiles, fp32
    )  # per tile of columns: summed in a fixed order, without atomics
    inputs = (grad.contiguous(), u[0].contiguous(), u[1].contiguous(), checked_weights(grad, weights))
    launch(
        _swiglu_backward_kernel,
        (row_tiles, tiles),
        *inputs,
        *grad_u,
        *grad_u_t,
        *hidden_t,
        grad_weights,
        m,
        width,
        eps,
        grad_eps,
        WEIGHTED=weights is not None,
        POW2=pow2,
        **_STRIP,
    )
    summed = None if weights is None else grad_weights.sum(1, keepdim=True)
    return SwigluGradients(grad_u, grad_u_t, hidden_t, summed)


def checked_weights(x: Tensor, weights: Tensor | None) -> Tensor:
    """weights, checked; where there are none, a tensor that the kernel does not read."""
    if weights is None:
        return x
    if tuple(weights.shape) != (x.size(0), 1):
        raise ValueError(f"weights of shape {tuple(weights.shape)}: {tuple(x.shape)} needs {(x.size(0), 1)}")
    return weights.contiguous()


@any_rows
def _swiglu_kernel(
    u_ptr,
    weights_ptr,
    q_ptr,
    scale_ptr,
    m,
    width,
    eps,
    WEIGHTED: tl.constexpr,
    POW2: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < m) & (columns[None, :] < width)
    at = u_ptr + rows[:, None].to(tl.int64) * (2 * width) + columns[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    hidden = gate * sigmoid(gate) * up
    if WEIGHTED:
        hidden *= tl.load(weights_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
    scale = tile_scale(tl.max(finite_abs(hidden), axis=1), eps, POW2)
    at = rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(q_ptr + at, to_e4m3(hidden, scale[:, None]), mask=inside)
    tl.store(scale_ptr + rows * tl.cdiv(width, 128) + tile, scale, mask=rows < m)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr,
    u_ptr,
    u_scale_ptr,
    weights_ptr,
    grad_u_ptr,
    grad_u_scale_ptr,
    grad_u_t_ptr,
    grad_u_t_scale_ptr,
    hidden_t_ptr,
    hidden_t_scale_ptr,
    grad_weights_ptr,
    m,
    width,
    eps,
    grad_eps,
    WEIGHTED: tl.constexpr,
    POW2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """128 rows × 128 columns of hidden, and the two halves of grad_u beside them, in strips of ROWS rows.

    A 128×1 tile spans all strips: the first pass over them finds its largest value, the second computes the strips
    again, which costs less than the registers to keep them.
    """
    row_tile, tile = tl.program_id(0), tl.program_id(1)
    tiles, row_tiles = width // 128, tl.cdiv(m, 128)
    columns = tile * 128 + tl.arange(0, 128)
    hidden_amax = tl.zeros((128,), tl.float32)
    gate_amax = tl.zeros((128,), tl.float32)
    up_amax = tl.zeros((128,), tl.float32)
    for strip in range(0, 128 // ROWS):
        rows = row_tile * 128 + strip * ROWS + tl.arange(0, ROWS)
        hidden, gate, up, of_weights = _gradients(
            grad_ptr, u_ptr, u_scale_ptr, weights_ptr, rows, columns, tile, m, width, WEIGHTED
        )
        _store_tiles(gate, grad_u_ptr, grad_u_scale_ptr, rows, columns, tile, m, width, grad_eps, POW2)
        _store_tiles(
            up, grad_u_ptr, grad_u_scale_ptr, rows, columns + width, tile + tiles, m, width, grad_eps, POW2
        )
        if WEIGHTED:
            tl.store(grad_weights_ptr + rows * tiles + tile, of_weights, mask=rows < m)
        hidden_amax = tl.maximum(hidden_amax, tl.max(finite_abs(hidden), axis=0))
        gate_amax = tl.maximum(gate_amax, tl.max(finite_abs(gate), axis=0))
        up_amax = tl.maximum(up_amax, tl.max(finite_abs(up), axis=0))
    hidden_scale = tile_scale(hidden_amax, eps, POW2)
    gate_scale = tile_scale(gate_amax, grad_eps, POW2)
    up_scale = tile_scale(up_amax, grad_eps, POW2)
    tl.store(hidden_t_scale_ptr + columns * row_tiles + row_tile, hidden_scale)
    tl.store(grad_u_t_scale_ptr + columns * row_tiles + row_tile, gate_scale)
    tl.store(grad_u_t_scale_ptr + (columns + width) * row_tiles + row_tile, up_scale)
    for strip in range(0, 128 // ROWS):
        rows = row_tile * 128 + strip * ROWS + tl.arange(0, ROWS)
        hidden, gate, up, _ = _gradients(
            grad_ptr, u_ptr, u_scale_ptr, weights_ptr, rows, columns, tile, m, width, WEIGHTED
        )
        _store_transposed(hidden, hidden_scale, hidden_t_ptr, rows, columns, m)
        _store_transposed(gate, gate_scale, grad_u_t_ptr, rows, columns, m)
        _store_transposed(up, up_scale, grad_u_t_ptr, rows, columns + width, m)


@triton.jit
def _gradients(
    grad_ptr, u_ptr, u_scale_ptr, weights_ptr, rows, columns, tile, m, width, WEIGHTED: tl.constexpr
):
    """For some rows: hidden, the gradients of gate and of up, and this tile's part of the weights' gradient."""
    gate = _load_tiles(u_ptr, u_scale_ptr, rows, columns, tile, m, width)
    up = _load_tiles(u_ptr, u_scale_ptr, rows, columns + width, tile + width // 128, m, width)
    at = rows[:, None].to(tl.int64) * width + columns[None, :]
    grad = tl.load(grad_ptr + at, mask=rows[:, None] < m, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    silu = gate * s
    hidden = silu * up
    of_weights = tl.sum(grad * hidden, axis=1)
    if WEIGHTED:
        weights = tl.load(weights_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
        hidden *= weights
        grad *= weights
    # silu' = sigmoid · (1 + gate · (1 − sigmoid))
    return hidden, grad * up * (s + silu - silu * s), grad * silu, of_weights


@triton.jit
def _load_tiles(u_ptr, scale_ptr, rows, columns, tile, m, width):
    """One 1×128 tile per row of the [m, 2·width] input, dequantised."""
    at = rows[:, None].to(tl.int64) * (2 * width) + columns[None, :]
    u = tl.load(u_ptr + at, mask=rows[:, None] < m, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + rows * (2 * (width // 128)) + tile, mask=rows < m, other=0.0)
    return u * scale[:, None]


@triton.jit
def _store_tiles(x, q_ptr, scale_ptr, rows, columns, tile, m, width, eps, POW2: tl.constexpr):
    """Write one 1×128 tile per row of an [m, 2·width] matrix."""
    scale = tile_scale(tl.max(finite_abs(x), axis=1), eps, POW2)
    at = rows[:, None].to(tl.int64) * (2 * width) + columns[None, :]
    tl.store(q_ptr + at, to_e4m3(x, scale[:, None]), mask=rows[:, None] < m)
    tl.store(scale_ptr + rows * (2 * (width // 128)) + tile, scale, mask=rows < m)


@triton.jit
def _store_transposed(x, scale, q_ptr, rows, columns, m):
    """Write columns of x, each with its scale, as rows of a matrix of m columns."""
    at = columns[:, None].to(tl.int64) * m + rows[None, :]
    tl.store(q_ptr + at, tl.trans(to_e4m3(x, scale[None, :])), mask=rows[None, :] < m)
