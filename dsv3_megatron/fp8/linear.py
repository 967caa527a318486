"""Linear layers of the reference backend whose three products take E4M3 operands (report §3.3.1).

    Fprop   y  = x · wᵀ     x by 1×128,   w by 128×128
    Dgrad   dx = dy · w     dy by 1×128,  w by 128×128
    Wgrad   dw = dyᵀ · x    dy by 128×1,  x by 128×1, in fp32

Each product is summed in fp32 and handed on in the layer's dtype; the weight gradient goes to `main_grad` in fp32.
For the backward pass a layer keeps its input in E4M3; the layer after attention keeps it in E5M6, and the down
projection of an MLP keeps the input of its SwiGLU in E4M3 and computes the output again (report §3.3.3).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.backends.linear import (
    ColumnLinear,
    DelayedWeightGrad,
    DuplicatedLinear,
    RowLinear,
    all_gather_first_dim,
)
from dsv3_megatron.fp8.arithmetic import arithmetic_for
from dsv3_megatron.fp8.precision import Recipe, recipe_of
from dsv3_megatron.fp8.swiglu import swiglu, swiglu_backward
from dsv3_megatron.fp8.tiles import Quantized

__all__ = [
    "FP8AttentionOutput",
    "FP8ColumnLinear",
    "FP8DownProjection",
    "FP8DuplicatedLinear",
    "FP8RowLinear",
    "FP8WeightGrad",
]


class FP8WeightGrad(DelayedWeightGrad):
    """Mixin of an FP8 layer: the recipe of its config, and weight gradients from E4M3 operands, now or later.

    Attributes:
        recipe: how its products are computed.
        pow2_input, pow2_gradient: the input, or the output's gradient, came through FP8 dispatch: its scales are powers
            of two, which makes quantising it again exact.
    """

    recipe: Recipe
    pow2_input = False
    pow2_gradient = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        recipe = recipe_of(self.config)
        assert recipe is not None, "FP8 layers are built for a recipe of ours only"
        self.recipe = recipe
        self.gradient_accumulation_fusion = (
            True  # ours, below and in backward_dw(): main_grad += fp32 gradient
        )

    def weight_grad(self, x_t: Quantized, grad_t: Quantized) -> Tensor:
        """dw [N, K] in fp32 from the transposed input [K, M] and the transposed output gradient [N, M]."""
        return self.recipe.product(grad_t, x_t)

    def accumulate_weight_grad(self, x_t: Quantized, grad_t: Quantized) -> None:
        """Add the same to the weight's `main_grad`."""
        self.weight.main_grad.add_(self.weight_grad(x_t, grad_t))

    def finish_weight_grad(self, *operands: Quantized) -> Tensor | None:
        """What backward returns for the weight; the operands are those of `weight_grad`."""
        if self._delays(self.weight):
            self.queue_weight_grad(*operands)
            return None
        weight_grad = self.weight_grad(*operands)
        if not hasattr(self.weight, "main_grad"):
            return weight_grad.to(self.weight.dtype)
        self.weight.main_grad.add_(weight_grad)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(self.weight)  # for the gradient hook, which only drops it

    def input_grad(self, gradient: Quantized, dtype: torch.dtype) -> Tensor:
        """dx [M, K], computed in fp32."""
        q, scale = self.recipe.weight(self.weight)
        return self.recipe.product(gradient, (q.t(), scale.t()), dtype)

    def output(self, x: Quantized, dtype: torch.dtype) -> Tensor:
        """y [M, N], computed in fp32."""
        return self.recipe.product(x, self.recipe.weight(self.weight), dtype)

    def quantize_gradient(self, grad_y: Tensor) -> tuple[Tensor, Quantized]:
        """The output gradient [M, N] as it was sent, and as Dgrad takes it."""
        grad = grad_y.reshape(-1, grad_y.size(-1))
        quantized = self.recipe.gradient(grad, self.pow2_gradient)
        return (arithmetic_for(grad).dequantize(*quantized) if self.pow2_gradient else grad), quantized

    def gradient_again(self, grad: Tensor) -> Quantized:
        """The output gradient [M, N], as it was sent, transposed and quantised for Wgrad."""
        return self.recipe.gradient(grad.t())


class _Linear(torch.autograd.Function):
    """y = x · wᵀ; under sequence parallelism x is gathered, in E4M3, and its gradient reduce-scattered."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        layer: FP8WeightGrad,
        sequence_parallel: bool = False,
        allreduce_dgrad: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        e5m6: bool = False,
    ) -> Tensor:
        matrix = x.reshape(-1, x.size(-1))
        quantized = layer.recipe.activation(matrix, layer.pow2_input)
        ctx.save_for_backward(*(arithmetic_for(matrix).pack_e5m6(matrix) if e5m6 else quantized))
        ctx.layer, ctx.shape, ctx.dtype, ctx.e5m6 = layer, x.shape, x.dtype, e5m6
        ctx.sequence_parallel, ctx.allreduce_dgrad, ctx.tp_group = (
            sequence_parallel,
            allreduce_dgrad,
            tp_group,
        )
        if sequence_parallel:
            quantized = _gather(quantized, tp_group)
        y = layer.output(quantized, x.dtype)
        return y.view(-1, *x.shape[1:-1], y.size(1))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        layer: FP8WeightGrad = ctx.layer
        grad, quantized = layer.quantize_gradient(grad_y)
        grad_x = layer.input_grad(quantized, ctx.dtype) if ctx.needs_input_grad[0] else None
        if grad_x is not None and ctx.sequence_parallel:
            scattered = grad_x.new_empty(grad_x.size(0) // dist.get_world_size(ctx.tp_group), grad_x.size(1))
            dist.reduce_scatter_tensor(scattered, grad_x, group=ctx.tp_group)
            grad_x = scattered
        elif grad_x is not None and ctx.allreduce_dgrad:
            dist.all_reduce(grad_x, group=ctx.tp_group)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            cached, scale = ctx.saved_tensors
            if ctx.sequence_parallel:
                cached, scale = _gather((cached, scale), ctx.tp_group)
            if ctx.e5m6:
                x = arithmetic_for(cached).unpack_e5m6(cached, scale, ctx.shape[-1])
                x_t = layer.recipe.activation(x.t())
            else:
                x_t = layer.recipe.activation_again((cached, scale))
            weight_grad = layer.finish_weight_grad(x_t, layer.gradient_again(grad))
        return None if grad_x is None else grad_x.view(ctx.shape), weight_grad, *[None] * 5


class _SwiGLULinear(torch.autograd.Function):
    """y = (SwiGLU(u) · probs) · wᵀ; keeps u in E4M3 and computes SwiGLU again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, probs: Tensor | None, weight: Tensor, layer: FP8WeightGrad) -> Tensor:
        matrix = u.reshape(-1, u.size(-1))
        weights = None if probs is None else probs.reshape(-1, 1)
        hidden = swiglu(matrix.float(), weights)
        y = layer.output(layer.recipe.activation(hidden), u.dtype)
        ctx.save_for_backward(*layer.recipe.activation(matrix), weights)
        ctx.layer, ctx.shape, ctx.dtype = layer, u.shape, u.dtype
        return y.view(*u.shape[:-1], y.size(1))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        layer: FP8WeightGrad = ctx.layer
        *cached, weights = ctx.saved_tensors
        u = arithmetic_for(cached[0]).dequantize(*cached)
        grad, quantized = layer.quantize_gradient(grad_y)
        grad_u, grad_probs = swiglu_backward(u, weights, layer.input_grad(quantized, torch.float32))
        weight_grad = None
        if ctx.needs_input_grad[2]:
            hidden_t = layer.recipe.activation(swiglu(u, weights).t())
            weight_grad = layer.finish_weight_grad(hidden_t, layer.gradient_again(grad))
        if grad_probs is not None:
            grad_probs = grad_probs.view(ctx.shape[:-1]).to(weights.dtype)
        return grad_u.to(ctx.dtype).view(ctx.shape), grad_probs, weight_grad, None


def _gather(x: Quantized, group: dist.ProcessGroup | None) -> Quantized:
    """All ranks' rows. Quantising by rows and gathering give the same in either order."""
    q, scale = x
    return all_gather_first_dim(q.view(torch.uint8), group).view(q.dtype), all_gather_first_dim(scale, group)


class FP8ColumnLinear(FP8WeightGrad, ColumnLinear):
    """`ColumnLinear` with FP8 products; a routed expert's input came through FP8 dispatch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pow2_input = self.is_expert and self.recipe.dispatch == "e4m3"

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        return _Linear.apply(
            input, weight, self, kwargs["sequence_parallel"], kwargs["allreduce_dgrad"], self.tp_group
        )


class FP8RowLinear(FP8WeightGrad, RowLinear):
    """`RowLinear` with FP8 products."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        return _Linear.apply(input, weight, self)


class FP8AttentionOutput(FP8RowLinear):
    """The Linear after attention: keeps its input in E5M6, since attention's backward uses it too (report §3.3.3)."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        return _Linear.apply(input, weight, self, False, False, None, True)


class FP8DownProjection(FP8RowLinear):
    """The second Linear of an MLP, with the SwiGLU before it; a routed expert's output gradient came through dispatch.

    Call it with (u, probs): the first Linear's output [..., 2·H] and, in a routed expert, one weight per token.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pow2_gradient = self.is_expert and self.recipe.dispatch == "e4m3"

    def _forward_impl(self, input: tuple[Tensor, Tensor | None], weight: Tensor, **kwargs: Any) -> Tensor:
        return _SwiGLULinear.apply(*input, weight, self)


class FP8DuplicatedLinear(FP8WeightGrad, DuplicatedLinear):
    """`DuplicatedLinear` with FP8 products."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x: [..., in] → ([..., out], None); None stands for Megatron's separate bias."""
        return _Linear.apply(x, self.weight, self), None
