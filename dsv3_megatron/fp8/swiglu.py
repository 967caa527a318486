"""SwiGLU with the routing weight of each token, and its derivative, written out; with its input as E4M3 keeps it.

The report keeps SwiGLU's input in E4M3 and computes its output again in the backward pass (§3.3.3): `swiglu_and_cache`
goes forward, `swiglu_from_cache` and `swiglu_gradients` start from what was kept. A tile never spans gate and up.
"""

import torch
from torch import Tensor

from dsv3_megatron.fp8.tiles import Quantized, dequantize, quantize_tile

__all__ = ["swiglu", "swiglu_and_cache", "swiglu_backward", "swiglu_from_cache", "swiglu_gradients"]


def swiglu(u: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) · up · weight.

    Args:
        u: [M, 2·H] fp32, the gate's H columns and then up's.
        weights: [M, 1], or None for 1.

    Returns:
        [M, H] fp32.
    """
    gate, up = u.chunk(2, dim=1)
    hidden = torch.nn.functional.silu(gate).mul_(up)
    return hidden if weights is None else hidden.mul_(weights)


def swiglu_backward(u: Tensor, weights: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of u [M, 2·H] and of the weights [M, 1] (None without) from the output's, [M, H]; fp32."""
    gate, up = u.chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad_weights = None
    if weights is not None:
        grad_weights = (grad * silu * up).sum(1, keepdim=True)
        grad = grad * weights
    # silu' = sigmoid · (1 + gate · (1 − sigmoid)) = sigmoid + silu − silu · sigmoid
    grad_gate = grad * up * (sigmoid + silu - silu * sigmoid)
    return torch.cat([grad_gate, grad * silu], dim=1), grad_weights


def swiglu_and_cache(u: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Quantized]:
    """SwiGLU of u, and u in E4M3.

    Args:
        u: [M, 2·H], any float dtype; the arithmetic is fp32.
        weights: [M, 1], or None for 1.

    Returns:
        The output [M, H] in u's dtype; q [M, 2·H] E4M3 with scale [M, 2·⌈H/128⌉] fp32: gate's tiles and then up's.
    """
    hidden = swiglu(u.float(), None if weights is None else weights.float()).to(u.dtype)
    q, scale = quantize_tile(u.reshape(2 * u.size(0), u.size(1) // 2))
    return hidden, (q.view(u.shape), scale.view(u.size(0), 2 * scale.size(1)))


def swiglu_from_cache(u: Quantized, weights: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """The output [M, H] of `swiglu_and_cache` again, from the u that it kept."""
    return swiglu(_cached(u), None if weights is None else weights.float()).to(dtype)


def swiglu_gradients(
    grad: Tensor, u: Quantized, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients at the kept u: of u [M, 2·H] in grad's dtype, of the weights [M, 1] in fp32 (None without).

    Args:
        grad: [M, H], of the output.
        u, weights: as `swiglu_and_cache` had and gave them.
    """
    weights = None if weights is None else weights.float()
    grad_u, grad_weights = swiglu_backward(_cached(u), weights, grad.float())
    return grad_u.to(grad.dtype), grad_weights


def _cached(u: Quantized) -> Tensor:
    """u [M, 2·H] in fp32."""
    halves = (x.view(2 * x.size(0), x.size(1) // 2) for x in u)
    return dequantize(*halves).view(u[0].shape)
