"""FP8 products on Hopper's tensor cores, promoted to fp32 every 128 of K (report §3.3.2).

One pass of the loop multiplies one 128-wide tile of K: a wgmma that starts from zero, whose result the CUDA cores
scale and add to an fp32 sum. The ~14 bits of the tensor cores' accumulator thus never span more than 128 products.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_megatron.fp8.kernels.launch import any_rows, launch
from dsv3_megatron.fp8.kernels.tiles import E4M3, check_matrix, empty, tile_rows
from dsv3_megatron.fp8.tiles import Quantized

__all__ = ["gemm_nt", "grouped_gemm_nt"]

_ALIGNMENT = 16
_BLOCK = {"BLOCK_M": 128, "BLOCK_N": 128}
_LAUNCH = {"num_warps": 8, "num_stages": 4}


def gemm_nt(a: Quantized, b: Quantized, *, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """a · bᵀ, as `dsv3_megatron.fp8.gemm_nt` up to the order of fp32 sums.

    Args:
        a: q [M, K] with scale [M, ⌈K/128⌉] (1×128) or [⌈M/128⌉, ⌈K/128⌉] (128×128).
        b: q [N, K], likewise.
        out_dtype: float32 or bfloat16.

    Returns:
        [M, N] of `out_dtype`.

    Raises:
        ValueError: shapes do not fit.
    """
    k = check_matrix(a[0])[1]
    scales = {"A_TILE_ROWS": tile_rows("a", a, k), "B_TILE_ROWS": tile_rows("b", b, k)}
    m, n = a[0].size(0), b[0].size(0)
    out = empty(a[0], m, n, out_dtype)
    grid = (triton.cdiv(m, _BLOCK["BLOCK_M"]), triton.cdiv(n, _BLOCK["BLOCK_N"]))
    a, b = _wide(a), _wide(b)
    launch(_gemm_kernel, grid, *a, *b, out, m, n, a[0].size(1), **_LAUNCH, **_BLOCK, **scales)
    return out


def grouped_gemm_nt(
    a: Quantized,
    b: Sequence[Quantized],
    group_sizes: Sequence[int],
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`gemm_nt` expert by expert in one launch, as `dsv3_megatron.fp8.grouped_gemm_nt`.

    Args:
        a: q [ΣM, K], scale [ΣM, ⌈K/128⌉], the first group_sizes[0] rows for b[0] and so on.
        b: per expert q [N, K] and scale, all of one shape; the tensors stay where they are.
        group_sizes: rows of each expert; may be 0.
        out_dtype: float32 or bfloat16.

    Returns:
        [ΣM, N] of `out_dtype`.

    Raises:
        ValueError: sizes do not add up, or shapes do not fit.
    """
    m, k = check_matrix(a[0])
    if len(group_sizes) != len(b) or sum(group_sizes) != m:
        raise ValueError(f"{list(group_sizes)=} must name {len(b)} experts and sum to {m} rows")
    if tile_rows("a", a, k) != 1:
        raise ValueError("a must have one scale per 1×128 tile: rows of several experts share no block")
    layouts = {(tuple(q.shape), tile_rows("b", (q, scale), k), q.device) for q, scale in b}
    if len(layouts) != 1 or b[0][0].device != a[0].device:
        raise ValueError(f"all experts must have one shape and a's device {a[0].device}, got {layouts}")
    ((n, _), b_tile_rows, _) = layouts.pop()
    out = empty(a[0], m, n, out_dtype)
    a, experts = _wide(a), [_wide(expert) for expert in b]
    work = torch.tensor(_work(experts, group_sizes), dtype=torch.int64, device=out.device).view(-1, 4)
    grid = (work.size(0), triton.cdiv(n, _BLOCK["BLOCK_N"]))
    args = (*a, work, out, n, a[0].size(1))
    launch(_grouped_gemm_kernel, grid, *args, **_LAUNCH, **_BLOCK, B_TILE_ROWS=b_tile_rows)
    return out


def _wide(x: Quantized) -> Quantized:
    """Contiguous, with rows that start at multiples of 16 bytes, where loads can be wide.

    Costs a copy where K is ragged or the matrix is a view. Zeros are added: fewer than a tile, so no scale is.
    """
    q, scale = x
    q = torch.nn.functional.pad(q.contiguous().view(torch.uint8), [0, -q.size(1) % _ALIGNMENT]).view(E4M3)
    return (q.clone() if q.data_ptr() % _ALIGNMENT else q), scale.contiguous()


def _work(experts: Sequence[Quantized], group_sizes: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Per block of rows: its first row, the end of its expert's rows, the addresses of the expert's q and scale."""
    work, start = [], 0
    for (q, scale), size in zip(experts, group_sizes, strict=True):
        end = start + size
        work += [(row, end, q.data_ptr(), scale.data_ptr()) for row in range(start, end, _BLOCK["BLOCK_M"])]
        start = end
    return work


@any_rows
def _gemm_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    out_ptr,
    m,
    n,
    k,
    A_TILE_ROWS: tl.constexpr,
    B_TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = _add_tiles(
        total, a_ptr, a_scale_ptr, row, m, A_TILE_ROWS, b_ptr, b_scale_ptr, column, n, B_TILE_ROWS, k
    )
    _store(out_ptr, total, row, m, column, n)


@triton.jit
def _grouped_gemm_kernel(
    a_ptr,
    a_scale_ptr,
    work_ptr,
    out_ptr,
    n,
    k,
    B_TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    work = work_ptr + tl.program_id(0) * 4
    row, end = tl.load(work).to(tl.int32), tl.load(work + 1).to(tl.int32)
    b_ptr = tl.multiple_of(tl.load(work + 2).to(tl.pointer_type(tl.float8e4nv)), 16)
    b_scale_ptr = tl.load(work + 3).to(tl.pointer_type(tl.float32))
    column = tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = _add_tiles(total, a_ptr, a_scale_ptr, row, end, 1, b_ptr, b_scale_ptr, column, n, B_TILE_ROWS, k)
    _store(out_ptr, total, row, end, column, n)


@triton.jit
def _add_tiles(
    total,
    a_ptr,
    a_scale_ptr,
    row,
    m,
    A_TILE_ROWS: tl.constexpr,
    b_ptr,
    b_scale_ptr,
    column,
    n,
    B_TILE_ROWS: tl.constexpr,
    k,
):
    """total + Σ over the 128-wide tiles of K of a · bᵀ · scale_a · scale_b, from some row of a and of b on."""
    tiles = tl.cdiv(k, 128)
    inner = tl.arange(0, 128)
    # Past the edge any row will do: it is not stored.
    rows = tl.minimum(row + tl.arange(0, total.shape[0]), m - 1)
    columns = tl.minimum(column + tl.arange(0, total.shape[1]), n - 1)
    a_at = a_ptr + rows[:, None].to(tl.int64) * k + inner[None, :]
    b_at = b_ptr + columns[:, None].to(tl.int64) * k + inner[None, :]
    for tile in range(0, tiles):
        inside = tile * 128 + inner[None, :] < k
        a = tl.load(a_at + tile * 128, mask=inside, other=0.0)
        b = tl.load(b_at + tile * 128, mask=inside, other=0.0)
        product = tl.dot(a, tl.trans(b))
        # A block of rows lies within one 128×128 tile: then one number is all it needs.
        if A_TILE_ROWS == 1:
            product *= tl.load(a_scale_ptr + tile + rows * tiles)[:, None]
        else:
            product *= tl.load(a_scale_ptr + tile + row // 128 * tiles)
        if B_TILE_ROWS == 1:
            product *= tl.load(b_scale_ptr + tile + columns * tiles)[None, :]
        else:
            product *= tl.load(b_scale_ptr + tile + column // 128 * tiles)
        total += product
    return total


@triton.jit
def _store(out_ptr, total, row, m, column, n):
    rows = row + tl.arange(0, total.shape[0])
    columns = column + tl.arange(0, total.shape[1])
    at = out_ptr + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None, :] < n))
