"""NaN, Inf and loss spikes: found in the step in which they appear, traced to a rank and a microbatch, acted on.

Every stage's output and every loss are seen (`training.hooks`); nothing waits for the device until the
step's end, when the ranks agree on a verdict between the gradients and the optimizer (`training.hooks`).

    stop    every rank raises `BadStep`
    skip    weights, moments, expert biases and learning rate stay as they were; the data is used up
    rewind  as skip, and weights, moments and biases go back to the newest checkpoint; data and schedules go on, so that
            all batches since that checkpoint are left out, as PaLM's training did (arXiv 2204.02311, §5.1)
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model

from dsv3_megatron import dualpipe
from dsv3_megatron.resilience.findings import Finding, SpikeDetector, origins
from dsv3_megatron.training import hooks

MOST_IN_A_ROW = 10  # bad steps; then the run is not to be saved by skipping

_current: "StepGuard | None" = None


class BadStep(RuntimeError):
    """A step gave NaN, Inf or a loss spike; the text names ranks, stages and microbatches."""


def install(args: Any) -> None:
    """Guard the steps of this process as `args` say: `on_bad_step`, `loss_spike_factor`, `check_for_nan…`.

    Megatron's own look for NaN is switched off: it ends the job from within one rank, and knows no microbatch.
    """
    global _current
    check_nan, args.check_for_nan_in_loss_and_grad = args.check_for_nan_in_loss_and_grad, False
    if not check_nan and args.loss_spike_factor is None:
        return
    _current = StepGuard(args.on_bad_step, args.loss_spike_factor)
    hooks.before_step(_current.begin)
    hooks.on_output(_saw_output)
    hooks.on_loss(_saw_loss)
    hooks.before_update(_current.judge)
    hooks.after_step(_current.finish)


def _saw_output(model: Any, output: torch.Tensor) -> None:
    """Passes of an evaluation are not a step's."""
    if _current is not None and torch.is_grad_enabled():
        _current.forward(model, output)


def _saw_loss(total: torch.Tensor, num_tokens: torch.Tensor) -> None:
    if _current is not None and torch.is_grad_enabled():
        _current.loss(total, num_tokens)


class StepGuard:
    """What this rank saw in the step under way, and the verdict on it."""

    def __init__(self, action: str, spike_factor: float | None) -> None:
        self.action = action
        self.spikes = None if spike_factor is None else SpikeDetector(spike_factor)
        self.bad_in_a_row = 0
        self.bad = False
        self._routers: list[Any] | None = None

    # --- during the step

    def begin(self, call: dict[str, Any]) -> None:
        """Before a step."""
        self.bad = False
        self._outputs: list[tuple[Any, int, torch.Tensor]] = []  # chunk, its how-manieth pass, whether finite
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._passes: dict[int, int] = {}
        self._local_gradients: torch.Tensor | None = None
        if self._routers is None:
            self._routers = _routers(call["model"])
        self._biases = [(router, router.expert_bias.clone()) for router in self._routers]
        config = call["config"]
        if not isinstance(config.finalize_model_grads_func, _LookBeforeReducing):
            config.finalize_model_grads_func = _LookBeforeReducing(self, config.finalize_model_grads_func)

    def forward(self, model: Any, output: torch.Tensor) -> None:
        number = self._passes.get(id(model), 0)
        self._passes[id(model)] = number + 1
        self._outputs.append((model, number, torch.isfinite(output.detach()).all()))

    def loss(self, total: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """The loss belongs to the `forward` that was told last."""
        mean = total.detach().float() / num_tokens.clamp(min=1)
        self._losses.append((len(self._outputs) - 1, mean))

    def look_at_gradients(self, chunks: list[Any]) -> None:
        """This rank's own gradients, before they are reduced (with --overlap-grad-reduce: some of them after)."""
        sums = [buffer.grad_data.sum().float() for buffer in _buffers(chunks)]
        self._local_gradients = torch.isfinite(torch.stack(sums)).all() if sums else None

    # --- at its end

    def judge(self, call: dict[str, Any]) -> None:
        """Agree with all ranks whether the step was good, and keep the optimizer from a bad one.

        Raises:
            BadStep: on all ranks alike, if the step is to end the run.
        """
        mine, losses = self._findings(call["model"])
        worst = torch.tensor([len(mine)], device=torch.cuda.current_device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if not worst.item():
            self.bad_in_a_row = 0
            if self.spikes is not None:
                self.spikes.learn(losses)
            return
        self.bad = True
        self.bad_in_a_row += 1
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        step = call["iteration"] + 1
        found = origins(finding for findings in everyones for finding in findings)
        text = f"step {step} is bad: " + "; ".join(map(str, found))
        if self.action == "stop" or self.bad_in_a_row >= MOST_IN_A_ROW:
            if self.action != "stop":
                text += (
                    f"; the {self.bad_in_a_row}th bad step in a row, so --on-bad-step {self.action} gives up"
                )
            raise BadStep(text)
        if dist.get_rank() == 0:
            print(f"[guard] {text}: {self.action}", flush=True)
        self._keep_state(call)

    def finish(self, call: dict[str, Any], result: Any) -> None:
        """After a step."""
        if not self.bad:
            return
        del call["optimizer"].step
        if self.action == "rewind":
            from dsv3_megatron.resilience.saving import load_newest

            load_newest(call["model"], call["optimizer"])

    def _keep_state(self, call: dict[str, Any]) -> None:
        """Megatron's own way to pass over a step: an optimizer that reports no update."""
        call["optimizer"].step = lambda: (False, None, None)
        for router, bias in self._biases:
            router.expert_bias.copy_(bias)

    def _findings(self, chunks: list[Any]) -> tuple[list[Finding], list[float]]:
        """This rank's findings, and its losses per token."""
        finite = torch.stack([flag for *_, flag in self._outputs]).tolist() if self._outputs else []
        means = torch.stack([mean for _, mean in self._losses]).tolist() if self._losses else []
        limit = self.spikes.limit if self.spikes is not None else None
        places = {id(chunk): _Place.of(chunk, index, len(chunks)) for index, chunk in enumerate(chunks)}
        passes = self._passes
        found = []
        for (model, number, _), good in zip(self._outputs, finite, strict=True):
            if not good:
                found.append(places[id(model)].finding("output", number, passes[id(model)], math.nan))
        for index, ((position, _), mean) in enumerate(zip(self._losses, means, strict=True)):
            if self._outputs:
                model, number, _ = self._outputs[position]
                place, count = places[id(model)], passes[id(model)]
            else:  # Megatron's own overlapped schedule runs plans, which tell losses only, in order
                number, place, count = index, places[id(chunks[-1])], len(means)
            if not math.isfinite(mean):
                found.append(place.finding("loss", number, count, mean))
            elif limit is not None and mean > limit:
                found.append(place.finding("spike", number, count, mean, limit))
        if self._local_gradients is not None and not self._local_gradients.item():
            found.append(places[id(chunks[0])].finding("gradient", None, 0, math.nan))
        return found, means


class _LookBeforeReducing:
    """Megatron's `finalize_model_grads_func`, with a look at the local gradients first."""

    def __init__(self, guard: StepGuard, function: Any) -> None:
        self.guard, self.function = guard, function

    def __call__(self, chunks: list[Any], *args: Any, **kwargs: Any) -> Any:
        self.guard.look_at_gradients(chunks)
        return self.function(chunks, *args, **kwargs)


class _Place:
    """Where a model chunk is in the pipeline."""

    def __init__(self, rank: int, stage: int, column: int, direction: int) -> None:
        self.rank, self.stage, self.column, self.direction = rank, stage, column, direction

    @classmethod
    def of(cls, chunk: Any, index: int, num_chunks: int) -> "_Place":
        rank, world_size = dist.get_rank(), dist.get_world_size()
        placement = dualpipe.placement()
        if placement is not None:
            pipeline_rank = placement.pipeline_rank(rank, world_size)
            stage = placement.stages(pipeline_rank)[index]
            column = rank % (world_size // placement.num_ranks)
            return cls(rank, stage, column, int(placement.mirrored and stage != pipeline_rank))
        size = mpu.get_pipeline_model_parallel_world_size()
        stage = index * size + mpu.get_pipeline_model_parallel_rank()
        return cls(rank, stage, rank % (world_size // size), 0)

    def finding(
        self, kind: str, number: int | None, passes: int, value: float, limit: float | None = None
    ) -> Finding:
        """`number`: the chunk's how-manieth pass of `passes`; the second direction's microbatches come after."""
        microbatch = None if number is None else number + self.direction * passes
        return Finding(kind, self.rank, self.stage, self.column, microbatch, value, limit)


def _routers(chunks: list[Any]) -> list[Any]:
    return [
        module
        for chunk in chunks
        for module in get_attr_wrapped_model(chunk, "decoder", return_model_obj=True).modules()
        if getattr(module, "expert_bias", None) is not None
    ]


def _buffers(chunks: list[Any]) -> list[Any]:
    return [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
