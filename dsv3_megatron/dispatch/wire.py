"""Rows as bytes: a token in its own precision or in E4M3, and behind it what goes with it.

E4M3 has power-of-two scales per 1×128 (`fp8.dispatch.encode_message`), so that a gateway forwards the bytes as they
are, and the expert's first product quantises again what it receives without a change.
"""

import torch
from torch import Tensor

from dsv3_megatron.fp8.dispatch import decode_message, encode_message
from dsv3_megatron.fp8.tiles import TILE

__all__ = ["decode", "encode", "join", "split"]


def encode(x: Tensor, eps: float | None) -> Tensor:
    """x [n, h] → bytes [n, w]; eps: floor of a tile's largest value for E4M3 (0 for gradients), None for x's dtype."""
    if eps is None:
        return _bytes(x)
    return encode_message(x, eps)


def width(hidden: int, dtype: torch.dtype, eps: float | None) -> int:
    """w of `encode`."""
    return hidden * dtype.itemsize if eps is None else hidden + -(-hidden // TILE)


def decode(message: Tensor, hidden: int, dtype: torch.dtype, eps: float | None) -> Tensor:
    """bytes [n, w] → [n, hidden]."""
    if eps is None:
        return message.contiguous().view(dtype)
    return decode_message(message, hidden).to(dtype)


def join(*parts: Tensor) -> Tensor:
    """Several tensors [n, …] of any dtype as one message [n, bytes]."""
    rows = [_bytes(part) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def split(message: Tensor, *parts: tuple[int, torch.dtype]) -> list[Tensor]:
    """The inverse for (columns, dtype) of each part."""
    pieces = message.split([columns * dtype.itemsize for columns, dtype in parts], dim=1)
    return [
        # A copy always: a single row is contiguous where it is, but its bytes may not be aligned for its dtype.
        piece.clone(memory_format=torch.contiguous_format).view(dtype).view(len(message), columns)
        for piece, (columns, dtype) in zip(pieces, parts, strict=True)
    ]


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).view(len(x), x.shape[1] * x.dtype.itemsize)
