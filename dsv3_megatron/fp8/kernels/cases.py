"""What `make kernels` compiles: every kernel in every configuration that DeepSeek-V3's sizes use.

Triton makes a binary per combination of dtypes, constants and divisibility of the sizes by 16, so that most sizes
share one. Rows are the 4096 tokens of a microbatch, or those of an expert: any number, such as 1501.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.fp8.kernels.e5m6 import pack_e5m6, unpack_e5m6
from dsv3_megatron.fp8.kernels.gemm import gemm_nt, grouped_gemm_nt
from dsv3_megatron.fp8.kernels.message import decode_message, dequantize, encode_message
from dsv3_megatron.fp8.kernels.swiglu import swiglu_quantize_tile, swiglu_quantize_tile_backward
from dsv3_megatron.fp8.kernels.swiglu_cache import swiglu_and_cache, swiglu_from_cache, swiglu_gradients
from dsv3_megatron.fp8.kernels.tiles import (
    quantize_block,
    quantize_tile,
    quantize_tile_t,
    requantize_transposed,
)
from dsv3_megatron.fp8.tiles import Quantized

BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
TOKENS = 4096
OF_AN_EXPERT = 1501
EXPERTS_OF_A_RANK = (1501, 0, 2000, 595)  # EP64: four experts, one without tokens
# (inputs, outputs), report §4.2
LINEARS = {
    "q_down": (7168, 1536),
    "q_up": (1536, 24576),
    "kv_down": (7168, 576),
    "kv_up": (512, 32768),
    "attention_output": (16384, 7168),
    "dense_fc1": (7168, 36864),
    "dense_fc2": (18432, 7168),
    "expert_fc1": (7168, 4096),
    "expert_fc2": (2048, 7168),
}


@dataclass(frozen=True)
class Case:
    """A call on meta tensors; with `flops` of the tensor cores its kernels must multiply FP8 matrices."""

    name: str
    call: partial[Any]
    flops: int = 0

    @property
    def function(self) -> str:
        """Name of the function of this package that it calls."""
        return str(self.call.func.__name__)

    @property
    def expects_wgmma(self) -> bool:
        return self.flops > 0


def v3_cases() -> Iterator[Case]:
    for name, (inputs, outputs) in LINEARS.items():
        rows = OF_AN_EXPERT if name.startswith("expert") else TOKENS
        yield from _linear(name, rows, inputs, outputs)
    for name in ("dense", "expert"):
        yield from _swiglu(name)
    x = matrix(TOKENS, LINEARS["attention_output"][0])
    packed = matrix(TOKENS, x.size(1) // 2 * 3, torch.uint8), matrix(TOKENS, x.size(1) // 128, FP32)
    yield Case("attention_output E5M6 pack", partial(pack_e5m6, x))
    yield Case("attention_output E5M6 unpack", partial(unpack_e5m6, *packed, dtype=BF16))
    yield from _dispatch()


def _linear(name: str, rows: int, inputs: int, outputs: int) -> Iterator[Case]:
    """Operands and products of y [rows, outputs] = x [rows, inputs] · w [outputs, inputs]ᵀ."""
    for dtype in (BF16, FP32):
        kind = f"{name} {str(dtype).removeprefix('torch.')}"
        for pow2 in (False, True):
            words = f"{kind}{' pow2' if pow2 else ''}"
            for what, columns in (("activation", inputs), ("gradient", outputs)):
                x = matrix(rows, columns, dtype)
                yield Case(f"{words} {what}", partial(quantize_tile, x, pow2=pow2))
                yield Case(f"{words} {what} for wgrad", partial(quantize_tile_t, x, pow2=pow2))
        yield Case(f"{kind} weight", partial(quantize_block, matrix(outputs, inputs, dtype)))
    for pow2 in (False, True):
        words = f"{name}{' pow2' if pow2 else ''} cached activation for wgrad"
        yield Case(words, partial(requantize_transposed, *tiled(rows, inputs), pow2=pow2))
    x, grad, w, w_t = (
        tiled(rows, inputs),
        tiled(rows, outputs),
        blocked(outputs, inputs),
        blocked(inputs, outputs),
    )
    x_t, grad_t = tiled(inputs, rows), tiled(outputs, rows)
    flops = 2 * rows * inputs * outputs
    yield Case(f"{name} fprop", partial(gemm_nt, x, w, out_dtype=BF16), flops)
    yield Case(f"{name} dgrad", partial(gemm_nt, grad, w_t, out_dtype=BF16), flops)
    yield Case(f"{name} wgrad", partial(gemm_nt, grad_t, x_t), flops)
    if name.startswith("expert"):
        sizes = EXPERTS_OF_A_RANK
        x, grad = tiled(sum(sizes), inputs), tiled(sum(sizes), outputs)
        experts, experts_t = (
            [blocked(*shape) for _ in sizes] for shape in ((outputs, inputs), (inputs, outputs))
        )
        flops = 2 * sum(sizes) * inputs * outputs
        fprop = partial(grouped_gemm_nt, x, experts, sizes, out_dtype=BF16)
        yield Case(f"{name} grouped fprop", fprop, flops)
        dgrad = partial(grouped_gemm_nt, grad, experts_t, sizes, out_dtype=BF16)
        yield Case(f"{name} grouped dgrad", dgrad, flops)


def _swiglu(name: str) -> Iterator[Case]:
    """Between the two Linears of an MLP; a routed expert's tokens have weights."""
    rows = OF_AN_EXPERT if name == "expert" else TOKENS
    weights = matrix(rows, 1, FP32) if name == "expert" else None
    width = LINEARS[f"{name}_fc2"][0]
    for pow2 in (False, True):
        words = f"{name}{' pow2' if pow2 else ''} SwiGLU"
        u, grad = matrix(rows, 2 * width), matrix(rows, width)
        yield Case(words, partial(swiglu_quantize_tile, u, weights, pow2=pow2))
        backward = partial(swiglu_quantize_tile_backward, grad, tiled(rows, 2 * width), weights, pow2=pow2)
        yield Case(f"{words} backward", backward)
    u, grad, cache = matrix(rows, 2 * width), matrix(rows, width), tiled(rows, 2 * width)
    yield Case(f"{name} SwiGLU, input kept", partial(swiglu_and_cache, u, weights))
    yield Case(f"{name} SwiGLU again", partial(swiglu_from_cache, cache, weights, dtype=BF16))
    yield Case(f"{name} SwiGLU gradients", partial(swiglu_gradients, grad, cache, weights))


def _dispatch() -> Iterator[Case]:
    """A microbatch's tokens, each to eight experts: sent by all-to-all, or by DeepEP with their scales apart."""
    rows, hidden = TOKENS * 8, LINEARS["expert_fc1"][0]
    message = matrix(rows, hidden + hidden // 128, torch.uint8)
    yield Case("dispatch encode", partial(encode_message, matrix(rows, hidden), 1e-4))
    yield Case("dispatch decode", partial(decode_message, message, hidden, BF16))
    yield Case("DeepEP encode", partial(quantize_tile, matrix(TOKENS, hidden), pow2=True))
    yield Case("DeepEP decode", partial(dequantize, *tiled(rows, hidden), dtype=BF16))


def matrix(rows: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def tiled(rows: int, columns: int) -> Quantized:
    """q and the scales of 1×128 tiles."""
    return matrix(rows, columns, E4M3), matrix(rows, -(-columns // 128), FP32)


def blocked(rows: int, columns: int) -> Quantized:
    """q and the scales of 128×128 blocks."""
    return matrix(rows, columns, E4M3), matrix(-(-rows // 128), -(-columns // 128), FP32)
