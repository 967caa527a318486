"""What FP8 dispatch sends: rows in E4M3 with their scales as bytes (report §3.3.3).

Scales are powers of two, so that a byte holds one, and so that the first product of the expert can quantise what it
receives again without a change.
"""

import torch
from torch import Tensor

from dsv3_megatron.fp8.tiles import TILE, dequantize, quantize_tile

__all__ = ["decode_message", "encode_message"]


def encode_message(x: Tensor, eps: float) -> Tensor:
    """Rows x [M, K] as bytes [M, K + ⌈K/128⌉]: E4M3 by 1×128 tiles, then each tile's exponent, biased by 127.

    `eps` is the floor of a tile's largest absolute value: 1e-4 for activations, 0 for gradients.
    """
    q, scale = quantize_tile(x, eps=eps, pow2=True)
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    return torch.cat([q.view(torch.uint8), exponents], dim=1)


def decode_message(message: Tensor, num_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows [M, num_columns] of `encode_message`; bf16 holds them exactly too, but for those below 2⁻¹²⁶."""
    q, exponents = message.split([num_columns, -(-num_columns // TILE)], dim=1)
    scale = (exponents.int() << 23).view(torch.float32)
    return dequantize(q.contiguous().view(torch.float8_e4m3fn), scale, dtype)
