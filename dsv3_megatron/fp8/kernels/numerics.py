"""Device functions that every kernel here shares; they follow `dsv3_megatron.fp8.tiles` operation by operation.

Divisions are IEEE (`div_rn`): Triton's `/` is an approximation on CUDA and would flip roundings.
"""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def finite_abs(x):
    """|x|, 0 where x is NaN or infinite: what is not finite takes no part in a scale."""
    return tl.where(is_finite(x), tl.abs(x), 0.0)


@triton.jit
def ceil_to_power_of_two(x):
    """The smallest power of two ≥ x, for positive normal numbers: any mantissa bit carries into the exponent."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def tile_scale(amax, eps, POW2: tl.constexpr):
    """Dequantisation scale of tiles whose largest absolute value is amax."""
    scale = tl.maximum(tl.div_rn(tl.maximum(amax, eps), E4M3_MAX), SMALLEST_NORMAL)
    if POW2:
        scale = ceil_to_power_of_two(scale)
    return tl.where((amax == 0.0) & (eps == 0.0), 1.0, scale)


@triton.jit
def to_e4m3(x, scale):
    """x / scale in E4M3; NaN where x is not finite (the conversion itself would saturate ±inf)."""
    x, scale = tl.broadcast(x, scale)
    return tl.where(is_finite(x), tl.div_rn(x, scale), float("nan")).to(tl.float8e4nv)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
