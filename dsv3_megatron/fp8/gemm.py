"""Products of quantised matrices, and how exactly they are summed (report §3.3.2)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dsv3_megatron.fp8.tiles import TILE, Quantized, dequantize, expand_scale

__all__ = ["Accumulate", "difference", "gemm_nt", "grouped_gemm_nt"]

Accumulate = Literal["fp32", "h800"]

_MMA_K = 32  # products that one tensor core instruction adds to the accumulator
_LOW_BITS = 10  # of fp32's 24 significant bits, those that an accumulator of 14 does not have


def gemm_nt(
    a: Quantized, b: Quantized, accumulate: Accumulate = "fp32", promote_every: int | None = TILE
) -> Tensor:
    """a · bᵀ = Σ over tiles of (q_a · q_bᵀ · scale_a · scale_b), summed in fp32.

    Args:
        a: q [M, K], scale [M, ⌈K/128⌉] (1×128) or [⌈M/128⌉, ⌈K/128⌉] (128×128).
        b: q [N, K], scale [N, ⌈K/128⌉] or [⌈N/128⌉, ⌈K/128⌉].
        accumulate: "fp32": exact sums up to fp32's rounding, in one product of dequantised operands. "h800": inside
            an interval sums are kept as the H800's tensor cores keep them, in a register of 14 significant bits that
            is truncated each time 32 products are added.
        promote_every: with "h800", how often along K (a multiple of 128) the register is added to an fp32 sum; None:
            never, the whole sum is kept in 14 bits.

    Returns:
        [M, N] fp32.

    Raises:
        ValueError: shapes do not fit, or an argument is not one of the above.
    """
    _check(a, b, accumulate, promote_every)
    if accumulate == "fp32":
        return dequantize(*a).matmul(dequantize(*b).t())
    total = a[0].new_zeros(a[0].size(0), b[0].size(0), dtype=torch.float32)
    interval = promote_every or a[0].size(1)
    for start in range(0, a[0].size(1), max(interval, 1)):
        total += _sum_of_14_bits(_columns(a, start, interval), _columns(b, start, interval))
    return total


def grouped_gemm_nt(
    a: Quantized,
    b: Sequence[Quantized],
    group_sizes: Sequence[int],
    accumulate: Accumulate = "fp32",
    promote_every: int | None = TILE,
) -> Tensor:
    """`gemm_nt` expert by expert: rows of a belong to one of the matrices b.

    Args:
        a: q [ΣM, K], scale [ΣM, ⌈K/128⌉], the first group_sizes[0] rows for b[0] and so on.
        b: per expert q [N, K] and scale.
        group_sizes: rows of each expert; may be 0.

    Returns:
        [ΣM, N] fp32.

    Raises:
        ValueError: the sizes do not add up, or as `gemm_nt`.
    """
    if len(group_sizes) != len(b) or sum(group_sizes) != a[0].size(0):
        raise ValueError(f"{list(group_sizes)=} must name {len(b)} experts and sum to {a[0].size(0)} rows")
    rows = zip(a[0].split(list(group_sizes)), a[1].split(list(group_sizes)), strict=True)
    return torch.cat([gemm_nt(part, w, accumulate, promote_every) for part, w in zip(rows, b, strict=True)])


def difference(x: Tensor, y: Tensor) -> float:
    """1 − 2Σxy / Σ(x² + y²) in float64: the measure of DeepGEMM's tests; 0 for equal tensors, also of zeros."""
    x, y = x.double(), y.double()
    denominator = (x * x + y * y).sum().item()
    return 1 - 2 * (x * y).sum().item() / denominator if denominator else 0.0


def _check(a: Quantized, b: Quantized, accumulate: str, promote_every: int | None) -> None:
    if accumulate not in ("fp32", "h800"):
        raise ValueError(f"accumulate={accumulate!r}: use 'fp32' or 'h800'")
    if promote_every is not None and (promote_every <= 0 or promote_every % TILE):
        raise ValueError(f"promote_every={promote_every}: use a multiple of {TILE}, or None for never")
    if a[0].size(1) != b[0].size(1):
        raise ValueError(f"inner dimensions differ: a is {tuple(a[0].shape)}, b is {tuple(b[0].shape)}")
    tiles = -(-a[0].size(1) // TILE)
    for name, (_, scale) in (("a", a), ("b", b)):
        if scale.size(1) != tiles:
            raise ValueError(
                f"{name}'s scale has {scale.size(1)} columns, K={a[0].size(1)} needs {tiles}: scales must be "
                f"constant over {TILE} elements of K"
            )


def _columns(x: Quantized, start: int, width: int) -> Quantized:
    """Columns of a quantised matrix; both numbers are multiples of 128, or reach the end."""
    tiles = slice(start // TILE, -(-(start + width) // TILE))
    return x[0][:, start : start + width], x[1][:, tiles]


def _sum_of_14_bits(a: Quantized, b: Quantized) -> Tensor:
    """a · bᵀ in a register of 14 bits. Scales are powers of two or not; each is applied to whole partial sums."""
    rows, columns = (expand_scale(s, torch.Size((q.size(0), s.size(1)))) for q, s in (a, b))
    left, right = a[0].float(), b[0].float()
    register: Tensor | None = None
    for start in range(0, left.size(1), _MMA_K):
        tile = start // TILE
        part = left[:, start : start + _MMA_K].matmul(right[:, start : start + _MMA_K].t())
        part *= rows[:, tile, None]
        part *= columns[None, :, tile]
        register = _truncate(part if register is None else register.add_(part))
    return register if register is not None else left.new_zeros(left.size(0), right.size(0))


def _truncate(x: Tensor) -> Tensor:
    """Cut fp32 numbers to 14 significant bits, towards zero, in place."""
    x.view(torch.int32).bitwise_and_(-1 << _LOW_BITS)
    return x
