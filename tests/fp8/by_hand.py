"""An FP8 linear layer written out in NumPy: which matrix is quantised how in which product (report §3.3)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.fp8.independent import Array, e5m6, swiglu, tile


class Result(NamedTuple):
    """Output, and gradients of input, weight and (down projection) routing weights; float64."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    dprobs: Tensor | None = None


def linear(
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    cache: str = "e4m3",
    pow2_input: bool = False,
    pow2_gradient: bool = False,
) -> Result:
    """y = x·wᵀ and its gradients for x [M, K], w [N, K], dy [M, N]."""
    x_, w_, dy_ = numpy(x), tile(numpy(w), 128, 128), numpy(dy)
    x_q = tile(x_, 1, 128, pow2=pow2_input)
    cached = e5m6(x_) if cache == "e5m6" else x_q
    dx, dw = _backward(dy_, w_, cached, pow2_gradient)
    return Result(tensor(x_q @ w_.T), tensor(dx), tensor(dw))


def swiglu_linear(
    u: Tensor, probs: Tensor | None, w: Tensor, dy: Tensor, pow2_gradient: bool = False
) -> Result:
    """y = (SwiGLU(u)·probs)·wᵀ for u [M, 2·H], probs [M], w [N, H]; backward starts from u in E4M3."""
    u_, w_ = numpy(u), tile(numpy(w), 128, 128)
    weights = None if probs is None else numpy(probs)[:, None]
    y = tile(swiglu(u_, weights).astype(np.float32), 1, 128) @ w_.T
    cached = tile(u_, 1, 128)
    dh, dw = _backward(numpy(dy), w_, swiglu(cached, weights), pow2_gradient)
    # The derivative of SwiGLU by autograd, in float64.
    cached_u = torch.tensor(cached, requires_grad=True)
    p = torch.ones(len(cached), dtype=torch.float64) if probs is None else probs.detach().double()
    p.requires_grad_()
    gate, up = cached_u.chunk(2, dim=1)
    (torch.nn.functional.silu(gate) * up * p[:, None]).backward(tensor(dh))
    return Result(tensor(y), cached_u.grad, tensor(dw), None if probs is None else p.grad)


def _backward(dy: Array, w: Array, cached: Array, pow2: bool) -> tuple[Array, Array]:
    """Dgrad from dy by 1×128, Wgrad from both operands by 128×1; gradients have no floor."""
    dy_q = tile(dy, 1, 128, eps=0, pow2=pow2)
    if pow2:  # it came quantised
        dy = dy_q.astype(np.float32)
    dw = tile(dy, 128, 1, eps=0).T @ tile(cached.astype(np.float32), 128, 1)
    return dy_q @ w, dw


def numpy(x: Tensor) -> Array:
    return x.detach().float().numpy()


def tensor(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))
