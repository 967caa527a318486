"""E5M6: twelve bits per number, for the input of the Linear after attention (report §3.3.3).

The report gives the name and the power-of-two scales; layout and rounding are ours:

    bit 11: sign    bits 10–6: exponent, bias 15    bits 5–0: mantissa

    exponent > 0     ± (1 + mantissa/64) · 2^(exponent − 15)
    exponent = 0     ± mantissa/64 · 2^−14                  (subnormal; 2^−20 is the smallest)
    0x7FF, 0xFFF     NaN; there is no infinity, the largest number is 0x7FE = 129024

Rounding is to nearest, ties to even; finite numbers beyond the largest become the largest, NaN and ±inf become NaN.

A row is a stream of bits, lowest first: code i has bits 12·i … 12·i + 11. So two codes a, b fill three bytes, a[7:0],
b[3:0] a[11:8], b[11:4], and eight fill three little-endian 32-bit words, which is how the kernels write them.
"""

import functools

import torch
from torch import Tensor

from dsv3_megatron.fp8.tiles import TILE, amax_of_tiles, ceil_to_power_of_two, expand_scale

__all__ = ["E5M6_MAX", "decode_e5m6", "encode_e5m6", "pack_e5m6", "unpack_e5m6"]

E5M6_MAX = 129024.0
_BIAS, _MANTISSA_BITS = 15, 6
_LARGEST_CODE, _NAN_CODE, _SIGN = 0x7FE, 0x7FF, 0x800


def pack_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise by 1×128 tiles with power-of-two scales, and pack.

    Args:
        x: [M, K], any float dtype.

    Returns:
        bytes [M, 3·⌈K/2⌉] uint8 and scale [M, ⌈K/128⌉] fp32: the smallest power of two (from 2⁻¹²⁶) that brings the
        tile's largest finite absolute value to at most 129024; 1 for a tile of zeros.
    """
    amax = amax_of_tiles(x, 1, TILE)
    scale = ceil_to_power_of_two((amax / E5M6_MAX).clamp_min_(2.0**-126))
    scale = torch.where(amax == 0, 1.0, scale)
    codes = encode_e5m6(x.float() / expand_scale(scale, x.shape))
    return _pack(codes), scale


def unpack_e5m6(
    packed: Tensor, scale: Tensor, num_columns: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The numbers of `pack_e5m6`.

    Args:
        packed, scale: as returned.
        num_columns: K; needed only where it is odd.
        dtype: of the result; bf16 holds the numbers exactly too, but for those below 2⁻¹²⁶.

    Returns:
        [M, K] in dtype.
    """
    values = decode_e5m6(_unpack(packed)[:, :num_columns])
    return values.mul_(expand_scale(scale, values.shape)).to(dtype)


def encode_e5m6(x: Tensor) -> Tensor:
    """Codes, int16, of fp32 numbers."""
    magnitude = x.abs()
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp_(1 - _BIAS, 128)
    # |x| in units of the last mantissa bit. A number that rounds up to the next power of two carries by itself.
    units = torch.ldexp(magnitude, _MANTISSA_BITS - exponent).round_()
    code = ((exponent + _BIAS) << _MANTISSA_BITS) + units.clamp_max_(128).int() - (1 << _MANTISSA_BITS)
    code = torch.where(x.isfinite(), code.clamp_max_(_LARGEST_CODE), _NAN_CODE)
    return torch.where(x.signbit(), code | _SIGN, code).to(torch.int16)


def decode_e5m6(codes: Tensor) -> Tensor:
    """fp32 numbers of codes in 0 … 4095."""
    return _table(codes.device)[codes.int()]


@functools.cache
def _table(device: torch.device) -> Tensor:
    """The numbers of all 4096 codes."""
    code = torch.arange(4096, device=device)
    exponent, mantissa = (code >> _MANTISSA_BITS) & 31, (code & 63).float() / 64
    value = torch.where(
        exponent > 0,
        torch.ldexp(1 + mantissa, exponent - _BIAS),
        torch.ldexp(mantissa, torch.tensor(1 - _BIAS, device=device)),
    )
    value = torch.where((code & _NAN_CODE) == _NAN_CODE, torch.nan, value)
    return torch.where(code >= _SIGN, -value, value)


def _pack(codes: Tensor) -> Tensor:
    if codes.size(1) % 2:
        codes = torch.nn.functional.pad(codes, [0, 1])
    a, b = codes.int().unflatten(1, (-1, 2)).unbind(2)
    return torch.stack([a & 255, (a >> 8) | ((b & 15) << 4), b >> 4], 2).to(torch.uint8).flatten(1)


def _unpack(packed: Tensor) -> Tensor:
    low, middle, high = packed.int().unflatten(1, (-1, 3)).unbind(2)
    return torch.stack([low | ((middle & 15) << 8), (middle >> 4) | (high << 4)], 2).flatten(1)
