"""Block-scaled products through `torch.nn.functional.scaled_mm`: the operands as cuBLASLt wants them.

    mat_a [M, K] row-major, mat_b [K, N] column-major; M, N, K multiples of 16
    1×128      scale [rows, ⌈K/128⌉] of stride (1, rows)
    128×128    scale [L, ⌈rows/128⌉] of stride (1, L), where L is ⌈K/128⌉ rounded up to a multiple of 4

Rows of b are columns of mat_b. The layouts are those that torch checks (PyTorch #166752, from cuBLAS's "scaling factors
layouts"); they came with `scaled_mm` itself, in torch 2.10.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3_megatron.fp8.tiles import TILE, Quantized

__all__ = ["Arguments", "arguments", "is_blocked", "scaled_mm"]

_MULTIPLE = 16  # of M, N and K
_BLOCKS = 4  # of the scales of 128×128 blocks along K


class Arguments(NamedTuple):
    """What `scaled_mm` is called with; recipes are names of `torch.nn.functional.ScalingType`."""

    mat_a: Tensor
    mat_b: Tensor
    scale_a: Tensor
    scale_recipe_a: str
    scale_b: Tensor
    scale_recipe_b: str


def scaled_mm(a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Tensor:
    """a · bᵀ of a [M, K] and b [N, K], as `gemm_nt` computes it up to the order of sums: [M, N] of out_dtype.

    Sums are promoted to fp32 (`use_fast_accum=False`).

    Raises:
        ValueError: both operands have scales by 128×128, which cuBLASLt has not.
    """
    given = arguments(a, b)
    types = torch.nn.functional.ScalingType
    out = torch.nn.functional.scaled_mm(
        given.mat_a,
        given.mat_b,
        given.scale_a,
        getattr(types, given.scale_recipe_a),
        given.scale_b,
        getattr(types, given.scale_recipe_b),
        output_dtype=out_dtype,
        use_fast_accum=False,
    )
    return out[: a[0].size(0), : b[0].size(0)].contiguous()


def arguments(a: Quantized, b: Quantized) -> Arguments:
    """The call for a [M, K] · b [N, K]ᵀ, filled up with zeros to multiples of 16.

    Raises:
        ValueError: as `scaled_mm`.
    """
    if is_blocked(a) and is_blocked(b):
        raise ValueError("scaled_mm has no product of two matrices with a scale per 128×128")
    (q_a, scale_a, recipe_a), (q_b, scale_b, recipe_b) = _operand(a), _operand(b)
    return Arguments(q_a, q_b.t(), scale_a, recipe_a, scale_b, recipe_b)


def is_blocked(x: Quantized) -> bool:
    """Whether x [rows, K] has a scale per 128×128, and not per 1×128."""
    q, scale = x
    return scale.size(0) != q.size(0)


def _operand(x: Quantized) -> tuple[Tensor, Tensor, str]:
    q, scale = x
    rows, columns = (-size % _MULTIPLE for size in q.shape)
    q = pad(q.contiguous().view(torch.uint8), [0, columns, 0, rows]).view(q.dtype)
    if is_blocked(x):
        return q, pad(scale, [0, -scale.size(1) % _BLOCKS]).contiguous().t(), "BlockWise128x128"
    return q, pad(scale, [0, 0, 0, rows]).t().contiguous().t(), "BlockWise1x128"


assert TILE == 128  # cuBLASLt's
