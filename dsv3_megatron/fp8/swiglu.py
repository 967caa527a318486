"""SwiGLU with the routing weight of each token, and its derivative, written out."""

import torch
from torch import Tensor

__all__ = ["swiglu", "swiglu_backward"]


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
