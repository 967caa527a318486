"""What `make kernels` compiles: every kernel in the configurations that DeepSeek-V3's sizes use.

Tokens of one microbatch: 4096; those of one expert are any number, so ragged rows are always part of a kernel. The
Linears of the model (hidden 7168): q_lora 1536, kv_lora + rope 576, attention output 128·128, dense FFN 18432, expert
FFN 2048.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_megatron.fp8.kernels import e5m6, gemm, swiglu, tiles

TOKENS, HIDDEN, EXPERT_FFN, DENSE_FFN, ATTENTION, KV = 4096, 7168, 2048, 18432, 16384, 576
BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """A call on meta tensors; `expects_wgmma`: its kernels multiply FP8 matrices."""

    name: str
    call: Callable[[], object]
    expects_wgmma: bool = False


def matrix(rows: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def tiled(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """q and the scales of 1×128 tiles."""
    return matrix(rows, columns, E4M3), matrix(rows, -(-columns // 128), FP32)


def blocked(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """q and the scales of 128×128 blocks."""
    return matrix(rows, columns, E4M3), matrix(-(-rows // 128), -(-columns // 128), FP32)


def routing_weights() -> Tensor:
    return matrix(TOKENS, 1, FP32)


def packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """E5M6 bytes and scales."""
    return matrix(rows, 3 * columns // 2, torch.uint8), matrix(rows, columns // 128, FP32)


def swiglu_backward(width: int, weights: Tensor | None) -> object:
    return swiglu.swiglu_quantize_tile_backward(matrix(TOKENS, width), tiled(TOKENS, 2 * width), weights)


def grouped(k: int, n: int) -> Tensor:
    """The four experts that a rank of EP64 has, one without tokens."""
    sizes = [1500, 0, 2000, 596]
    return gemm.grouped_gemm_nt(tiled(TOKENS, k), [blocked(n, k)] * len(sizes), sizes, out_dtype=BF16)


CASES = (
    Case("quantize_tile fp32", lambda: tiles.quantize_tile(matrix(TOKENS, HIDDEN, FP32))),
    Case("quantize_tile 4096x7168", lambda: tiles.quantize_tile(matrix(TOKENS, HIDDEN))),
    Case("quantize_tile 4096x7168 pow2", lambda: tiles.quantize_tile(matrix(TOKENS, HIDDEN), pow2=True)),
    Case("quantize_tile_t 4096x2048", lambda: tiles.quantize_tile_t(matrix(TOKENS, EXPERT_FFN))),
    Case("quantize_tile_t 4096x7168 pow2", lambda: tiles.quantize_tile_t(matrix(TOKENS, HIDDEN), pow2=True)),
    Case("requantize_transposed 4096x7168", lambda: tiles.requantize_transposed(*tiled(TOKENS, HIDDEN))),
    Case(
        "requantize_transposed 4097x2048", lambda: tiles.requantize_transposed(*tiled(TOKENS + 1, EXPERT_FFN))
    ),
    Case("quantize_block 4096x7168 fp32", lambda: tiles.quantize_block(matrix(2 * EXPERT_FFN, HIDDEN, FP32))),
    Case("quantize_block 576x7168", lambda: tiles.quantize_block(matrix(KV, HIDDEN))),
    Case("pack_e5m6 4096x16384", lambda: e5m6.pack_e5m6(matrix(TOKENS, ATTENTION))),
    Case("unpack_e5m6 4096x16384", lambda: e5m6.unpack_e5m6(*packed(TOKENS, ATTENTION))),
    Case(
        "swiglu expert",
        lambda: swiglu.swiglu_quantize_tile(matrix(TOKENS, 2 * EXPERT_FFN), routing_weights()),
    ),
    Case("swiglu dense pow2", lambda: swiglu.swiglu_quantize_tile(matrix(TOKENS, 2 * DENSE_FFN), pow2=True)),
    Case("swiglu backward expert", lambda: swiglu_backward(EXPERT_FFN, routing_weights())),
    Case("swiglu backward dense", lambda: swiglu_backward(DENSE_FFN, None)),
    Case(
        "gemm fprop q_down",
        lambda: gemm.gemm_nt(tiled(TOKENS, HIDDEN), blocked(1536, HIDDEN), out_dtype=BF16),
        True,
    ),
    Case(
        "gemm fprop kv_down",
        lambda: gemm.gemm_nt(tiled(TOKENS, HIDDEN), blocked(KV, HIDDEN), out_dtype=BF16),
        True,
    ),
    Case(
        "gemm dgrad fc1",
        lambda: gemm.gemm_nt(tiled(TOKENS, 4096), blocked(HIDDEN, 4096), out_dtype=BF16),
        True,
    ),
    Case("gemm wgrad fc1", lambda: gemm.gemm_nt(tiled(4096, TOKENS), tiled(HIDDEN, TOKENS)), True),
    Case("grouped gemm fc1", lambda: grouped(HIDDEN, 2 * EXPERT_FFN), True),
    Case("grouped gemm fc2", lambda: grouped(EXPERT_FFN, HIDDEN), True),
)
