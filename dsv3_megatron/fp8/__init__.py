"""FP8 as DeepSeek-V3 trains with it: E4M3 by tiles, E5M6 caches, sums promoted to fp32 (report §3.3).

The arithmetic here is plain PyTorch and needs neither Megatron nor a GPU.
"""

from dsv3_megatron.fp8.e5m6 import decode_e5m6, encode_e5m6, pack_e5m6, unpack_e5m6
from dsv3_megatron.fp8.gemm import difference, gemm_nt, grouped_gemm_nt
from dsv3_megatron.fp8.message import decode_message, encode_message
from dsv3_megatron.fp8.swiglu import swiglu_and_cache, swiglu_from_cache, swiglu_gradients
from dsv3_megatron.fp8.tiles import (
    dequantize,
    quantize_block,
    quantize_tile,
    quantize_tile_t,
    requantize_transposed,
)

__all__ = [
    "decode_e5m6",
    "decode_message",
    "dequantize",
    "difference",
    "encode_e5m6",
    "encode_message",
    "gemm_nt",
    "grouped_gemm_nt",
    "pack_e5m6",
    "quantize_block",
    "quantize_tile",
    "quantize_tile_t",
    "requantize_transposed",
    "swiglu_and_cache",
    "swiglu_from_cache",
    "swiglu_gradients",
    "unpack_e5m6",
]
