"""SwiGLU between two quantised Linears in plain PyTorch: what the fused kernels of `swiglu.py` compute.

Backward starts from the inputs as they are cached, in E4M3 with 1×128 tiles, and computes SwiGLU's output anew
(report §3.3.3).
"""

from typing import NamedTuple

from torch import Tensor

from dsv3_megatron.fp8.swiglu import swiglu, swiglu_backward
from dsv3_megatron.fp8.tiles import Quantized, dequantize, quantize_tile

__all__ = ["SwigluGradients", "swiglu_quantize_tile", "swiglu_quantize_tile_backward"]


class SwigluGradients(NamedTuple):
    """What the backward pass around a SwiGLU of width H needs.

    grad_u: gradient of u, [M, 2H] in 1×128 tiles: for the first Linear's input gradient.
    grad_u_t: the same, transposed, [2H, M] in 1×128 tiles: for the first Linear's weight gradient.
    hidden_t: the recomputed output, transposed, [H, M] in 1×128 tiles: for the second Linear's weight gradient.
    grad_weights: [M, 1] fp32, or None where there are no weights.
    """

    grad_u: Quantized
    grad_u_t: Quantized
    hidden_t: Quantized
    grad_weights: Tensor | None


def swiglu_quantize_tile(
    u: Tensor, weights: Tensor | None = None, *, eps: float = 1e-4, pow2: bool = False
) -> Quantized:
    """`quantize_tile` of `swiglu`: u [M, 2H], weights [M, 1] → q [M, H], scale [M, ⌈H/128⌉]."""
    return quantize_tile(swiglu(u.float(), weights), eps=eps, pow2=pow2)


def swiglu_quantize_tile_backward(
    grad: Tensor,
    u: Quantized,
    weights: Tensor | None = None,
    *,
    eps: float = 1e-4,
    grad_eps: float = 0.0,
    pow2: bool = False,
) -> SwigluGradients:
    """Gradients of `swiglu` at the cached u, quantised for both products that they enter.

    Args:
        grad: [M, H], of the output.
        u: q [M, 2H] and scale [M, 2H/128], cached by the forward pass.
        weights: [M, 1], as in the forward pass.
        eps, grad_eps: floors of amax for hidden_t and for grad_u; see `quantize_tile`.
        pow2: round scales up to powers of two.
    """
    inputs = dequantize(*u)
    grad_u, grad_weights = swiglu_backward(inputs, weights, grad.float())
    return SwigluGradients(
        grad_u=quantize_tile(grad_u, eps=grad_eps, pow2=pow2),
        grad_u_t=quantize_tile(grad_u.t(), eps=grad_eps, pow2=pow2),
        hidden_t=quantize_tile(swiglu(inputs, weights).t(), eps=eps, pow2=pow2),
        grad_weights=grad_weights,
    )
