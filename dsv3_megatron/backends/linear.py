"""Linear layers of the reference backend: Megatron's own, with a weight gradient that can be computed later.

With `config.delay_wgrad_compute` the backward pass computes only the input gradient and queues what the
weight gradient needs; each call of `backward_dw()` computes the oldest queued one. Zero-bubble schedules
(DualPipe, ZB1P) fill their bubbles with these calls. Transformer Engine's modules have the same interface;
Megatron's local ones do not.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor
from torch.nn import Parameter

from dsv3_megatron.backends import wgrad

__all__ = [
    "ColumnLinear",
    "DelayedWeightGrad",
    "DuplicatedLinear",
    "RowLinear",
    "all_gather_first_dim",
    "has_own_storage",
    "lay_out_for_inference",
    "num_pending_weight_grads",
    "run_pending_weight_grads",
]


class _LinearInputGradOnly(torch.autograd.Function):
    """y = x·wᵀ whose backward returns only the input gradient and hands (x, grad_y) to `layer` for later.

    Under sequence parallelism x is gathered along its first dimension and its gradient is reduce-scattered;
    the gathered x is what gets queued, so that the weight gradient itself needs no communication.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        layer: "DelayedWeightGrad",
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.tp_group = layer, tp_group
        ctx.sequence_parallel, ctx.allreduce_dgrad = sequence_parallel, allreduce_dgrad
        full_x = all_gather_first_dim(x, tp_group) if sequence_parallel else x
        return full_x.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        full_x = all_gather_first_dim(x, ctx.tp_group) if ctx.sequence_parallel else x
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y.matmul(weight)
            if ctx.sequence_parallel:
                scattered = torch.empty_like(x)
                dist.reduce_scatter_tensor(scattered, grad_x.contiguous(), group=ctx.tp_group)
                grad_x = scattered
            elif ctx.allreduce_dgrad:
                grad_x = grad_x.contiguous()
                dist.all_reduce(grad_x, group=ctx.tp_group)
        ctx.layer.queue_weight_grad(full_x, grad_y)
        return grad_x, None, None, None, None, None


def all_gather_first_dim(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x [n, ...] of every rank of the group, one after the other: [n · size, ...]."""
    full = x.new_empty((x.size(0) * dist.get_world_size(group), *x.shape[1:]))
    dist.all_gather_into_tensor(full, x.contiguous(), group=group)
    return full


class DelayedWeightGrad:
    """Mixin of a module with one `weight`: the queue of weight gradients still to be computed."""

    weight: Parameter
    config: TransformerConfig
    tp_group: dist.ProcessGroup
    gradient_accumulation_fusion: bool

    def _init_delayed_weight_grad(self) -> None:
        self._pending: deque[tuple[Any, Any]] = deque()
        self._wgrad_hooks: list[Callable[[], None]] = []
        if self.config.delay_wgrad_compute:
            # Megatron's DDP then registers its gradient hook with the module (below) instead of with
            # autograd, which would fire before the gradient exists.
            self.weight.skip_backward_post_hook = True  # type: ignore[attr-defined]

    def _delays(self, weight: Tensor) -> bool:
        return self.config.delay_wgrad_compute and weight.requires_grad

    def queue_weight_grad(self, x: Any, grad_y: Any) -> None:
        """Keep what one weight gradient needs, the arguments of `weight_grad`."""
        self._pending.append((x, grad_y))

    def weight_grad(self, x: Any, grad_y: Any) -> Tensor:
        """The weight's gradient [out, in] from x [..., in] and grad_y [..., out]."""
        return grad_y.reshape(-1, grad_y.size(-1)).t().matmul(x.reshape(-1, x.size(-1)))

    def accumulate_weight_grad(self, x: Any, grad_y: Any) -> None:
        """Add the weight's gradient to its `main_grad` in fp32, without rounding it to the weight's dtype before."""
        wgrad.accumulate(x, grad_y, self.weight.main_grad)

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Called by DDP: `hook` adds weight.grad to main_grad and may start the bucket's reduction."""
        self._wgrad_hooks.append(hook)

    def backward_dw(self) -> None:
        """Compute the oldest queued weight gradient; does nothing unless `config.delay_wgrad_compute`.

        Without DDP the gradient is added to `weight.grad`; with DDP its hooks add it to `weight.main_grad`.
        With gradient accumulation fusion it is added to main_grad here, and the hooks only count it as ready.

        Raises:
            RuntimeError: nothing is queued, or DDP was built without `delay_wgrad_compute`, so that the
                gradient would be lost.
        """
        if not self._delays(self.weight):
            return
        if not self._pending:
            raise RuntimeError(
                "backward_dw(): no weight gradient is queued; each call needs its own backward pass"
            )
        if hasattr(self.weight, "main_grad") and not self._wgrad_hooks:
            raise RuntimeError(
                "backward_dw(): the weight has a main_grad but DDP registered no hook with this module; set "
                "delay_wgrad_compute=True in DistributedDataParallelConfig, as in the model's config"
            )
        x, grad_y = self._pending.popleft()
        with torch.no_grad():
            if self.gradient_accumulation_fusion and hasattr(self.weight, "main_grad"):
                self.accumulate_weight_grad(x, grad_y)
                self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
                self.weight.grad = torch.empty_like(self.weight)  # for DDP's hook, which only drops it
            elif self.weight.grad is None:
                self.weight.grad = self.weight_grad(x, grad_y).to(self.weight.dtype)
            else:
                self.weight.grad.add_(self.weight_grad(x, grad_y))
        for hook in self._wgrad_hooks:
            hook()


class ColumnLinear(DelayedWeightGrad, ColumnParallelLinear):
    """Megatron's ColumnParallelLinear (weight [out/TP, in]) with `backward_dw()`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._init_delayed_weight_grad()

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; in inference without what prepares for a backward pass, which costs more than the product."""
        if not torch.is_inference_mode_enabled() or type(self) is not ColumnLinear or self.bias is not None:
            return super().forward(input_, weight, runtime_gather_output)
        gathers = self.sequence_parallel and not self.explicit_expert_comm
        x = all_gather_first_dim(input_, self.tp_group) if gathers else input_
        y = torch.matmul(x, (self.weight if weight is None else weight).t())
        gather_output = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gather_output and self.tp_group.size() > 1:
            y = gather_from_tensor_model_parallel_region(y, group=self.tp_group)
        return y, None

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        if not self._delays(weight):
            return super()._forward_impl(input=input, weight=weight, **kwargs)
        if kwargs["bias"] is not None:
            raise ValueError(
                "delay_wgrad_compute needs linear layers without bias: use --disable-bias-linear"
            )
        return _LinearInputGradOnly.apply(
            input, weight, self, kwargs["sequence_parallel"], kwargs["allreduce_dgrad"], self.tp_group
        )


class RowLinear(DelayedWeightGrad, RowParallelLinear):
    """Megatron's RowParallelLinear (weight [out, in/TP]) with `backward_dw()`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._init_delayed_weight_grad()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; see `ColumnLinear.forward`."""
        if not torch.is_inference_mode_enabled() or type(self) is not RowLinear or self.bias is not None:
            return super().forward(x)
        y = torch.matmul(x, self.weight.t())
        if self.explicit_expert_comm or self.tp_group.size() == 1:
            return y, None
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(y, group=self.tp_group), None

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        if not self._delays(weight):
            return super()._forward_impl(input=input, weight=weight, **kwargs)
        return _LinearInputGradOnly.apply(input, weight, self, False, False, self.tp_group)


class DuplicatedLinear(DelayedWeightGrad, torch.nn.Module):
    """A linear layer whose whole weight [out, in] is on every tensor-parallel rank (MLA's down projections).

    Under sequence parallelism each rank applies it to its part of the sequence, without communication; the
    weight is marked `sequence_parallel`, so that its gradient is summed over the tensor-parallel ranks. This
    is what Transformer Engine's `parallel_mode="duplicated"` does, and checkpoints of the two are
    interchangeable.

    Args:
        input_size, output_size: in and out.
        config: read for dtype, sequence_parallel and delay_wgrad_compute.
        init_method: fills the weight in place, unless `config.perform_initialization` is off.
        tp_group: tensor-parallel group, for checkpoints only.
        **unused: what Megatron passes to every linear layer (bias=False, gather_output, names of buffers, …).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        **unused: Any,
    ):
        super().__init__()
        if bias:
            raise ValueError("DuplicatedLinear has no bias: use --disable-bias-linear")
        self.config = config
        self.tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=False, dim=-1, stride=1)
        self.weight.sequence_parallel = config.sequence_parallel
        if config.perform_initialization:
            init_method(self.weight)
        self._init_delayed_weight_grad()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x: [..., in] → ([..., out], None); None stands for Megatron's separate bias."""
        if self._delays(self.weight):
            return _LinearInputGradOnly.apply(x, self.weight, self, False, False, None), None
        if torch.is_inference_mode_enabled() or not self.weight.requires_grad:
            return torch.nn.functional.linear(x, self.weight), None
        y = linear_with_grad_accumulation_and_async_allreduce(
            x,
            self.weight,
            bias=None,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )
        return y, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight as a replica over the tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )

    def extra_repr(self) -> str:
        return f"in_features={self.weight.size(1)}, out_features={self.weight.size(0)}"


def has_own_storage(weight: Tensor) -> bool:
    """Whether the weight is alone in its memory: not in a buffer of DDP's, nor beside other experts."""
    return weight.untyped_storage().nbytes() == weight.nbytes


def lay_out_for_inference(model: torch.nn.Module) -> None:
    """Let the weights [out, in] of linear layers on the CPU lie in memory as [in, out]; shapes and values stay.

    With the few rows of a decode step such a product reads memory up to a third faster. Not for a model in training,
    whose optimizer and checkpoints expect contiguous weights. MLA's up projection is read by parts and stays.
    """
    for name, layer in model.named_modules():
        if type(layer) not in (ColumnLinear, RowLinear, DuplicatedLinear) or name.endswith(
            "linear_kv_up_proj"
        ):
            continue
        weight = layer._parameters["weight"]
        if (
            weight is not None
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and has_own_storage(weight)
        ):
            weight.data = weight.data.t().contiguous().t()


def _num_pending(layer: torch.nn.Module) -> int:
    """Weight gradients queued in one layer of either backend."""
    if isinstance(layer, DelayedWeightGrad):
        return len(layer._pending)
    store = getattr(layer, "wgrad_store", None)  # Transformer Engine's modules
    return store.context.qsize() if store is not None and store.delay_wgrad_compute() else 0


def num_pending_weight_grads(module: torch.nn.Module) -> int:
    """Weight gradients still queued anywhere in `module`; must be 0 at the end of a step."""
    return sum(_num_pending(layer) for layer in module.modules())


def run_pending_weight_grads(module: torch.nn.Module) -> None:
    """`backward_dw()` once on every layer in `module` that has something queued: the W of one microbatch."""
    for layer in module.modules():
        if _num_pending(layer):
            layer.backward_dw()  # type: ignore[operator]
