"""E4M3 with one scale per tile: 1×128 for activations and gradients, 128×128 for weights (report §3.3.2).

A quantised matrix is a pair `(q, scale)`: q in `torch.float8_e4m3fn`, scale in fp32, x ≈ q · scale. Edges may be
ragged: the last tile is then smaller.

What is not finite stays visible: NaN and ±inf become NaN (E4M3 has no infinity), and take no part in the tile's
scale, so that the other elements keep their values and every scale is finite and positive.
"""

import functools

import torch
from torch import Tensor

__all__ = [
    "E4M3_MAX",
    "TILE",
    "Quantized",
    "amax_of_tiles",
    "ceil_to_power_of_two",
    "dequantize",
    "expand_scale",
    "quantize_block",
    "quantize_tile",
    "quantize_tile_t",
    "quantize_with_scale",
    "requantize_transposed",
    "tile_scale",
]

TILE = 128
E4M3_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-126

Quantized = tuple[Tensor, Tensor]


def quantize_tile(x: Tensor, *, eps: float = 1e-4, pow2: bool = False) -> Quantized:
    """Quantise by 1×128 tiles along the last dimension.

    Args:
        x: [M, K], any float dtype; the arithmetic is fp32.
        eps: floor of a tile's largest absolute value. 1e-4 is published for activations; gradients use 0, since
            at 1e-9 the floor would lose 12 % of them. With 0 an all-zero tile has scale 1.
        pow2: round scales up to powers of two.

    Returns:
        q [M, K] E4M3 and scale [M, ⌈K/128⌉] fp32.

    Raises:
        ValueError: x is not a matrix, or eps is negative.
    """
    scale = tile_scale(amax_of_tiles(x, 1, TILE), eps, pow2)
    return quantize_with_scale(x, scale), scale


def quantize_tile_t(x: Tensor, *, eps: float = 1e-4, pow2: bool = False) -> Quantized:
    """Quantise by 128×1 tiles along the first dimension, as the weight gradient wants its operands.

    As `quantize_tile`, with scale [⌈M/128⌉, K].
    """
    scale = tile_scale(amax_of_tiles(x, TILE, 1), eps, pow2)
    return quantize_with_scale(x, scale), scale


def quantize_block(w: Tensor, *, eps: float = 1e-4, pow2: bool = False) -> Quantized:
    """Quantise by 128×128 blocks, as weights are. As `quantize_tile`, with scale [⌈M/128⌉, ⌈K/128⌉]."""
    scale = tile_scale(amax_of_tiles(w, TILE, TILE), eps, pow2)
    return quantize_with_scale(w, scale), scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q · scale, computed in fp32.

    Args:
        q: [M, K] E4M3.
        scale: fp32, one per 1×128, 128×1 or 128×128 tile; its shape tells which.
        dtype: of the result.

    Returns:
        [M, K] in dtype.

    Raises:
        ValueError: scale has the shape of none of them.
    """
    # A table: torch's own conversion takes five times as long on CPU.
    values = _table(q.device).index_select(0, q.view(torch.uint8).flatten().int())
    return values.view(q.shape).mul_(expand_scale(scale, q.shape)).to(dtype)


@functools.cache
def _table(device: torch.device) -> Tensor:
    """The numbers of all 256 codes, fp32."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def requantize_transposed(q: Tensor, scale: Tensor, *, eps: float = 1e-4, pow2: bool = False) -> Quantized:
    """Dequantise 1×128, transpose, quantise again: a cached activation as the weight gradient's operand.

    Args:
        q, scale: [M, K] and [M, ⌈K/128⌉], from `quantize_tile`.
        eps, pow2: of the new scales.

    Returns:
        q [K, M] and scale [K, ⌈M/128⌉]: 128×1 tiles of the matrix, which are 1×128 of its transpose.
    """
    return quantize_tile(dequantize(q, scale).t(), eps=eps, pow2=pow2)


def tile_scale(amax: Tensor, eps: float, pow2: bool) -> Tensor:
    """Dequantisation scales from the tiles' largest absolute values: max(amax, eps) / 448, fp32.

    At least the smallest normal number, 2⁻¹²⁶; 1 where amax and eps are 0.
    """
    if eps < 0:
        raise ValueError(f"eps={eps}: the floor of amax must not be negative")
    scale = (amax.clamp_min(eps) / E4M3_MAX).clamp_min_(_SMALLEST_NORMAL)
    if pow2:
        scale = ceil_to_power_of_two(scale)
    return scale if eps > 0 else torch.where(amax == 0, 1.0, scale)


def ceil_to_power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two ≥ x, for positive normal fp32 numbers; exact."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits + 0x7FFFFF) & 0x7F800000  # any mantissa bit carries into the exponent
    return exponent.view(torch.float32)


def expand_scale(scale: Tensor, shape: torch.Size) -> Tensor:
    """scale as a factor of a [M, K] matrix: [M or 1, K or 1], repeated along the directions that share scales."""
    for dim in (0, 1):
        size, tiles = shape[dim], -(-shape[dim] // TILE)
        if scale.size(dim) == size:
            continue
        if scale.size(dim) != tiles:
            raise ValueError(
                f"scale of shape {tuple(scale.shape)} does not belong to a matrix of shape {tuple(shape)}: dimension "
                f"{dim} must be {size} or {tiles} (one scale per {TILE})"
            )
        if tiles > 1:  # one tile is broadcast
            scale = scale.repeat_interleave(TILE, dim)[(slice(None),) * dim + (slice(size),)]
    return scale


def amax_of_tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """Largest finite absolute value of each tile of `rows`×`columns`, fp32."""
    if x.dim() != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(x.shape)}")
    amax = _largest(x.abs(), rows, columns).float()
    # Also where it is NaN. Looking is worth it on CPU; on other devices it would make the host wait.
    if x.device.type != "cpu" or not bool((amax < torch.inf).all()):
        finite = torch.where(x.isfinite(), x.abs(), 0.0)
        amax = _largest(finite, rows, columns).float()
    return amax


def _largest(x: Tensor, rows: int, columns: int) -> Tensor:
    """Maximum over tiles of a matrix without negative elements."""
    for dim, tile in ((1, columns), (0, rows)):
        if tile == 1:
            continue
        if 0 < x.size(dim) <= tile:  # one tile needs no padding
            x = x.amax(dim, keepdim=True)
            continue
        missing = -x.size(dim) % tile
        if missing:
            x = torch.nn.functional.pad(x, [0, missing] if dim == 1 else [0, 0, 0, missing])
        x = x.unflatten(dim, (x.size(dim) // tile, tile)).amax(dim + 1)
    return x


def quantize_with_scale(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, rounded to the nearest E4M3 number (ties to even); NaN where it is not finite."""
    ratio = x.float() / expand_scale(scale, x.shape)
    # torch's conversion saturates ±inf, or not, by its version.
    if x.device.type != "cpu" or not bool(ratio.sum().isfinite()):
        ratio = torch.where(ratio.isfinite(), ratio, torch.nan)
    return ratio.to(torch.float8_e4m3fn)
