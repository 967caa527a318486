"""Products of quantised matrices by the fastest means there is (`arithmetic`), with fp32 sums."""

import importlib

import torch
from torch import Tensor

from dsv3_megatron.fp8.arithmetic import KERNELS, Features, choose_product, features_of
from dsv3_megatron.fp8.gemm import gemm_nt
from dsv3_megatron.fp8.scaled_mm import is_blocked, scaled_mm
from dsv3_megatron.fp8.tiles import Quantized

__all__ = ["product"]


def product(
    a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32, features: Features | None = None
) -> Tensor:
    """a · bᵀ; see `gemm_nt`, whose result it is up to the order of fp32 sums, rounded to out_dtype.

    Args:
        a, b: q [M, K] and q [N, K] with scales by 1×128 or 128×128.
        features: of the device; looked up where None.
    """
    features = features_of(a[0].device) if features is None else features
    means = choose_product(features, is_blocked(a), is_blocked(b))
    if means == "scaled_mm":
        return scaled_mm(a, b, out_dtype)
    if means == "kernel":
        return _kernel(a, b, out_dtype)
    return gemm_nt(a, b).to(out_dtype)


def _kernel(a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Tensor:
    return importlib.import_module(KERNELS).gemm_nt(a, b, out_dtype=out_dtype)
