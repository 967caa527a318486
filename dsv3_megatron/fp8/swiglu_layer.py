"""SwiGLU between two Linears that takes less memory than either knows of, whoever's they are (report §3.3.3).

Of SwiGLU only its input is kept, in E4M3. Its output, which the Linear behind it keeps for Wgrad, gives up its memory
once that Linear has multiplied it, and is computed again from the kept input when the backward pass arrives: Megatron's
way with what it recomputes (`CheckpointWithoutOutput`), so that the Linear need not know.

    per token and unit of width     bf16      here
    SwiGLU's input                  4 bytes   2.06
    the next Linear's input         1.03      0      (in E4M3 by 128×1, as Transformer Engine keeps it)
"""

from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.fp8.arithmetic import arithmetic_for

__all__ = ["TakesSwiGLUInput", "swiglu_keeping_input"]


class Kept:
    """What the backward pass starts from: SwiGLU's input (q, scale) and the weights of its rows, until it has run."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, Tensor, Tensor | None] | None = None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up · weight of u [M, 2·H], weights [M, 1] or None; keeps u in E4M3."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weights: Tensor | None, kept: Kept) -> Tensor:
        hidden, (q, scale) = arithmetic_for(u).swiglu_and_cache(u, weights)
        ctx.save_for_backward(q, scale, weights)
        kept.tensors = q, scale, None if weights is None else weights.detach()
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, scale, weights = ctx.saved_tensors
        grad_u, grad_weights = arithmetic_for(q).swiglu_gradients(grad.contiguous(), (q, scale), weights)
        return grad_u, None if grad_weights is None else grad_weights.to(weights.dtype), None


def swiglu_keeping_input(u: Tensor, probs: Tensor | None) -> tuple[Tensor, Kept]:
    """SwiGLU's output, and what it kept.

    Args:
        u: [..., 2·H], gate's columns and then up's.
        probs: [...] or [..., 1], the routing weight of each token, or None.

    Returns:
        [..., H] in u's dtype.
    """
    kept = Kept()
    weights = None if probs is None else probs.reshape(-1, 1)
    hidden = _SwiGLU.apply(u.reshape(-1, u.size(-1)), weights, kept)
    return hidden.view(*u.shape[:-1], hidden.size(1)), kept


class TakesSwiGLUInput:
    """Mixin of an MLP's second Linear, which must keep its input as it is; called with SwiGLU's input and weights."""

    def forward(self, u_and_probs: tuple[Tensor, Tensor | None], *args: Any, **kwargs: Any) -> Any:
        hidden, kept = swiglu_keeping_input(*u_and_probs)
        result = super().forward(hidden, *args, **kwargs)  # type: ignore[misc]
        if result[0].requires_grad:
            compute_again(hidden, kept, until=result[0])
        return result


def compute_again(hidden: Tensor, kept: Kept, until: Tensor) -> None:
    """Free the memory of SwiGLU's output, and fill it again when the gradient of `until` arrives."""
    storage, size, dtype = hidden.untyped_storage(), hidden.nbytes, hidden.dtype

    def restore(_: Tensor) -> None:
        if kept.tensors is None:  # a second backward pass finds it restored
            return
        q, scale, weights = kept.tensors
        kept.tensors = None
        again = arithmetic_for(q).swiglu_from_cache((q, scale), weights, dtype=dtype)
        storage.resize_(size)
        storage.copy_(again.untyped_storage())  # not hidden.copy_(): autograd must not see a change

    storage.resize_(0)
    until.register_hook(restore)
