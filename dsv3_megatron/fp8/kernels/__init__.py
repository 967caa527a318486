"""Triton kernels for Hopper, each with the signature and the result of its PyTorch reference in `dsv3_megatron.fp8`.

They run on a CUDA device and nowhere else: CPU tensors are an error, not a fallback.
"""

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

__all__ = [
    "decode_message",
    "dequantize",
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
    "swiglu_quantize_tile",
    "swiglu_quantize_tile_backward",
    "unpack_e5m6",
]
