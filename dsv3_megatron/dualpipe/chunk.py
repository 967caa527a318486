"""A Megatron model chunk as a stage of the pipeline runner."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.utils import ScheduleNode, get_comp_stream
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import global_vars
from torch import Tensor

from dsv3_megatron.backends.linear import run_pending_weight_grads
from dsv3_megatron.dualpipe.gradients import GradientReduce
from dsv3_megatron.pipeline.stage import Pass
from dsv3_megatron.training import hooks


@dataclass
class Step:
    """What one call of Megatron's forward-backward function brings along, for all stages of a rank.

    Attributes:
        forward_step_func, collect_non_loss_data, forward_only: as given by Megatron.
        num_microbatches: microbatches that each stage sees; losses are averaged over them.
        losses: what the loss function reported, in the order of execution.
        num_tokens: sum of the loss functions' token counts.
    """

    config: Any
    forward_step_func: Callable
    num_microbatches: int
    forward_only: bool
    collect_non_loss_data: bool
    cp_size: int
    use_plans: bool
    reduce: GradientReduce
    losses: list = field(default_factory=list)
    num_tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int))


@dataclass
class _Saved:
    """Between a microbatch's forward and its backward."""

    activation: Tensor | None
    output: Tensor
    plan: TransformerModelChunkSchedulePlan | None = None
    loss: ScheduleNode | None = None


class ChunkStage:
    """Runs a (wrapped) model chunk for the runner; see `dsv3_megatron.pipeline.stage.Stage`.

    Without expert parallelism a chunk is called as it is. With it, forward and backward go through Megatron's schedule
    plan, layer by layer in four nodes, which is what lets two of them overlap (`overlap.py`).
    """

    def __init__(self, model: Any, stage: int, num_stages: int) -> None:
        self.model = model
        self.stage = stage
        self.is_last = stage == num_stages - 1
        self._vp_stage = get_attr_wrapped_model(model, "vp_stage")
        self._saved: dict[int, _Saved] = {}

    def begin(self, step: Step, data_iterator: Iterator | None) -> None:
        """Take up the next step."""
        assert not self._saved, (
            f"stage {self.stage}: microbatches {sorted(self._saved)} of the last step have no backward"
        )
        self.step = step
        self._data = data_iterator

    # --- the runner's interface

    def forward(self, which: Pass, activation: Tensor | None) -> Tensor | None:
        if self.step.use_plans:
            plan, loss_func = self.plan(which, activation)
            return self.planned(which, activation, plan, loss_func, plan.run(plan, None))
        step = self.step
        if activation is not None and not step.forward_only:
            activation.requires_grad_()
        output, num_tokens = schedules.forward_step(
            step.forward_step_func,
            self._data,
            self.model,
            step.num_microbatches,
            activation,
            step.losses,
            step.config,
            step.cp_size,
            step.collect_non_loss_data,
            is_first_microbatch=which.first,
            current_microbatch=which.microbatch,
            vp_stage=self._vp_stage,
            is_last_stage=self.is_last,
        )
        return self._finish_forward(which, _Saved(activation, output), num_tokens)

    def backward(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        results: list[Tensor | None] = []
        self.backward_and_send(which, gradient, results.append)
        return results[0]

    def backward_and_send(
        self, which: Pass, gradient: Tensor | None, send: Callable[[Tensor | None], None]
    ) -> None:
        if self._saved[which.microbatch].plan is None:
            send(self._backward_module(which, gradient))
            run_pending_weight_grads(self.model)
        else:
            saved, gradient = self.start_backward(which, gradient)
            assert saved.plan is not None
            # Called before the weight gradients of the last layer's attention.
            first = saved.activation is None
            saved.plan.run(
                None, saved.plan, b_grad=gradient, post_backward=lambda grad, _: send(None if first else grad)
            )
        self.finish_gradients(which)

    def backward_input(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        if self._saved[which.microbatch].plan is None:
            return self._backward_module(which, gradient)
        saved, gradient = self.start_backward(which, gradient)
        assert saved.plan is not None
        _keep_weight_gradients_for_later(saved.plan)
        saved.plan.run(None, saved.plan, b_grad=gradient)
        return None if saved.activation is None else saved.activation.grad

    def backward_weight(self, which: Pass) -> None:
        run_pending_weight_grads(self.model)
        self.finish_gradients(which)

    # --- schedule plans, also used by overlap.py

    def plan(
        self, which: Pass, activation: Tensor | None
    ) -> tuple[TransformerModelChunkSchedulePlan, Callable]:
        """The chunk's schedule plan for one microbatch, not yet run, and the loss function."""
        timers = self.step.config.timers
        if timers is not None:  # Megatron's calculation of the loss stops it
            timers("forward-compute", log_level=2).start()
        if activation is not None:
            activation.requires_grad_()
        if which.first and hasattr(self.model, "set_is_first_microbatch"):
            self.model.set_is_first_microbatch()
        schedules.set_current_microbatch(self.model, which.microbatch)
        get_attr_wrapped_model(self.model, "set_input_tensor")([activation])
        inner = get_attr_wrapped_model(self.model, "build_schedule_plan", return_model_obj=True)
        with _plans_allowed():
            plan, loss_func = self.step.forward_step_func(self._data, inner, return_schedule_plan=True)
        if plan.state.padding_mask is not None:
            _route_without_padding(plan)
        return plan, loss_func

    def planned(
        self,
        which: Pass,
        activation: Tensor | None,
        plan: TransformerModelChunkSchedulePlan,
        loss_func: Callable,
        output: Tensor,
    ) -> Tensor | None:
        """Loss, bookkeeping and result of a plan whose forward has run."""
        step = self.step
        hooks.saw_output(self.model, output)
        loss = ScheduleNode(loss_func, get_comp_stream, plan.event, name="loss_func")
        output, num_tokens = schedules.forward_step_calc_loss(
            self.model,
            output,
            loss.forward,
            step.config,
            self._vp_stage,
            step.collect_non_loss_data,
            step.num_microbatches,
            step.losses,
            step.cp_size,
            self.is_last,
        )
        return self._finish_forward(
            which, _Saved(activation, output, plan, loss if self.is_last else None), num_tokens
        )

    def start_backward(self, which: Pass, gradient: Tensor | None) -> tuple[_Saved, Tensor]:
        """What was saved for the microbatch of a planned backward, and the gradient of the plan's output."""
        saved = self._saved.pop(which.microbatch)
        if saved.loss is not None:
            output = saved.output
            if self.step.config.grad_scale_func is not None:
                output = self.step.config.grad_scale_func(output)
            torch.autograd.backward(output)
            gradient = saved.loss.get_grad()
            saved.loss._release_state()
        assert gradient is not None and saved.plan is not None
        return saved, gradient

    # --- common ends

    def _finish_forward(self, which: Pass, saved: _Saved, num_tokens: Tensor) -> Tensor | None:
        step = self.step
        step.num_tokens = step.num_tokens + num_tokens
        output = None if self.is_last else saved.output.detach()
        if not step.forward_only:
            self._saved[which.microbatch] = saved
            # What is sent keeps the storage; the graph needs only the node. (A plan without layers gives back its
            # input, whose shape the gradient must have.)
            if not self.is_last and saved.output is not saved.activation:
                schedules.deallocate_output_tensor(saved.output, step.config.deallocate_pipeline_outputs)
        return output

    def _backward_module(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        """Of a chunk that was called as it is: all but the weight gradients, which its modules keep."""
        saved = self._saved.pop(which.microbatch)
        return schedules.backward_step(saved.activation, saved.output, gradient, self.step.config)

    def finish_gradients(self, which: Pass) -> None:
        """After a pass with weight gradients: the stage's last one lets them be reduced."""
        if which.last:
            self.step.reduce.complete(self.stage)


@contextlib.contextmanager
def _plans_allowed() -> Iterator[None]:
    """The forward step of Megatron's `pretrain_gpt.py` gives a plan only where its own overlap is switched on."""
    args = global_vars._GLOBAL_ARGS
    if args is None or not args.bf16:
        yield  # a forward step of ours, or a test's: it gives plans without asking
        return
    args.overlap_moe_expert_parallel_comm = True
    try:
        yield
    finally:
        args.overlap_moe_expert_parallel_comm = False


def _keep_weight_gradients_for_later(plan: TransformerModelChunkSchedulePlan) -> None:
    """Make a plan's backward leave the weight gradients in the modules' own queues."""
    for layer in plan._transformer_layers:
        for node in (layer.pre_dispatch_computation, layer.mlp, layer.mtp_post_process):
            node.delay_wgrad_compute = False  # read by `node.backward_dw` only: "nothing was delayed"


def _route_without_padding(plan: TransformerModelChunkSchedulePlan) -> None:
    """Tell routers which tokens are padding, which Megatron's plans forget (its MoE layer alone does not)."""
    for layer_plan in plan._transformer_layers:
        layer = getattr(layer_plan.layer, "mtp_model_layer", layer_plan.layer)
        if isinstance(layer.mlp, MoELayer):
            node = layer_plan.pre_dispatch_computation
            node.submodule = functools.partial(_with_padding_mask, layer.mlp, node.submodule)


def _with_padding_mask(moe: MoELayer, submodule: Callable, node: Any, *args: Any) -> Any:
    route = moe.route

    def route_with_mask(hidden_states: Tensor) -> Any:
        # Read here: the MTP layer shifts it first. [B, S], as given, to the router's [S, B].
        return route(hidden_states, node.chunk_state.padding_mask.transpose(0, 1).bool())

    moe.route = route_with_mask
    try:
        return submodule(node, *args)
    finally:
        del moe.route
