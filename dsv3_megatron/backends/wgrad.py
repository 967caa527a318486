"""Weight gradients added in fp32 to `main_grad`, for the Linears that are not Transformer Engine's.

Gradient accumulation fusion (on by default) is what keeps weight gradients in fp32: without it a gradient is rounded to
the weight's bf16 before it is accumulated (report §3.3.3 accumulates in fp32). Transformer Engine brings its own
kernel; Megatron's Linears, the output head of both backends among them, want Apex's extension
`fused_weight_gradient_mlp_cuda`. Where that is missing, this module stands for it (patch `fused_wgrad`).

    main_grad += grad_outputᵀ · input        operands in the layer's dtype, sums and result in main_grad's
"""

import importlib
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "NAME",
    "accumulate",
    "extension",
    "implementation",
    "wgrad_gemm_accum_fp16",
    "wgrad_gemm_accum_fp32",
]

NAME = "fused_weight_gradient_mlp_cuda"  # Apex's extension, as Megatron imports it


def accumulate(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] += grad_outputᵀ · input, in place.

    Args:
        input: [..., in], grad_output: [..., out], of one floating dtype.
        main_grad: fp32, or the operands' dtype.
    """
    x, g = input.reshape(-1, input.size(-1)), grad_output.reshape(-1, grad_output.size(-1))
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(g.t(), x)
    elif not x.is_cuda:
        # bf16 products are exact in fp32, so this is the product summed in fp32.
        main_grad.addmm_(g.to(main_grad.dtype).t(), x.to(main_grad.dtype))
    else:  # cuBLAS: bf16 operands, sums and result in fp32
        torch.addmm(main_grad, g.t(), x, out_dtype=main_grad.dtype, out=main_grad)


def wgrad_gemm_accum_fp32(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Apex's function for an fp32 `main_grad`; see `accumulate`."""
    accumulate(input, grad_output, main_grad)


def wgrad_gemm_accum_fp16(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Apex's function for a `main_grad` in half precision, of the operands' dtype; see `accumulate`."""
    accumulate(input.to(main_grad.dtype), grad_output.to(main_grad.dtype), main_grad)


def extension() -> ModuleType:
    """A module with the two functions of Apex's extension."""
    module = ModuleType(NAME, __doc__)
    module.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32  # type: ignore[attr-defined]
    module.wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp16  # type: ignore[attr-defined]
    module.__dsv3__ = True  # type: ignore[attr-defined]
    return module


def implementation() -> Literal["apex", "torch"]:
    """Whose product accumulates the weight gradients of Megatron's own Linears."""
    try:
        module = importlib.import_module(NAME)
    except ImportError:
        return "torch"
    return "torch" if getattr(module, "__dsv3__", False) else "apex"
