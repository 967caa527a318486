"""A pipeline stage that takes a declared time: it sleeps, so that many ranks can share few cores.

A message is a small tensor whose first element is the `time.perf_counter()` at which it left (one clock for
all processes of a host), and a stage behind a link of latency `p2p` starts no earlier than that much later.
The same modules run under this package's runner and under Megatron's own schedules.
"""

import ctypes
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3_megatron.pipeline.autograd_stage import AutogradStage, WeightGradients
from dsv3_megatron.pipeline.stage import Half

MESSAGE_SHAPE = (8, 1, 1)  # as Megatron sends it: sequence, microbatch size, hidden
MESSAGE_DTYPE = torch.float64  # of the time stamps


_PR_SET_TIMERSLACK = 29  # <linux/prctl.h>
_WAKE_UP = 1e-4  # seconds
_AT_ONCE = 2e-3  # seconds; no W that was put off follows its B-input so soon


def wake_on_time() -> None:
    """Let this thread's sleeps end on time; by default Linux adds up to 50 µs to each."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


@dataclass(frozen=True)
class Durations:
    """Seconds of one stage's passes: forward, backward for the input, backward for the weights, link
    latencies."""

    forward: float
    backward_input: float
    backward_weight: float
    activation_latency: float = 0.0
    gradient_latency: float = 0.0


class SleepingStage(nn.Module):
    """Sleeps in an autograd Function's forward, input backward and weight backward.

    A pass lasts its declared time from the moment it is entered, the stage's own Python included: what is beyond is
    the schedule's and the runner's.
    """

    def __init__(self, durations: Durations, weight_gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.ones(1, dtype=MESSAGE_DTYPE)
        )  # makes the output of a first stage need gradients
        self.durations = durations
        self.weight_gradients = weight_gradients

    def forward(self, x: Tensor) -> Tensor:
        """MESSAGE_SHAPE to MESSAGE_SHAPE."""
        return _Sleep.apply(x, self.weight, self, time.perf_counter())


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stage: SleepingStage, entered: float) -> Tensor:
        ctx.stage = stage
        durations = stage.durations
        sleep_until(_start(entered, x, durations.activation_latency) + durations.forward)
        return stamped()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        entered = time.perf_counter()
        durations = ctx.stage.durations
        end = _start(entered, gradient, durations.gradient_latency) + durations.backward_input
        sleep_until(end)

        def backward_weight() -> None:
            # At once it continues the backward, put off it starts when it is called.
            begun = time.perf_counter()
            sleep_until((end if begun - end < _AT_ONCE else begun) + durations.backward_weight)

        ctx.stage.weight_gradients.put(backward_weight)
        return stamped(), None, None, None


def _start(entered: float, message: Tensor | None, latency: float) -> float:
    """When a pass can start: once `message` (None at an end of the pipeline) has crossed its link."""
    if message is None or latency == 0:
        return entered
    return max(entered, message.flatten()[0].item() + latency)


def sleep_until(end: float) -> None:
    """Return when `time.perf_counter()` is `end`: asleep, but for the moment by which a sleeper is late."""
    left = end - time.perf_counter()
    if left > _WAKE_UP:
        time.sleep(left - _WAKE_UP)
    while time.perf_counter() < end:
        pass


def stamped() -> Tensor:
    """A message that leaves now."""
    return torch.full(MESSAGE_SHAPE, time.perf_counter(), dtype=MESSAGE_DTYPE)


def as_one_block(forward: Half, backward: Half) -> None:
    """An overlapped pair as the tables have it: starts with both inputs, and both results leave at its end."""
    assert isinstance(forward.stage, AutogradStage) and isinstance(backward.stage, AutogradStage)
    activation, gradient = forward.receive(), backward.receive()
    now = time.perf_counter()
    sleep_until(
        max(
            _start(now, activation, forward.stage.module.durations.activation_latency),
            _start(now, gradient, backward.stage.module.durations.gradient_latency),
        )
    )
    output = forward.stage.forward(forward.which, activation)
    input_gradient = backward.stage.backward(backward.which, gradient)
    forward.send(None if output is None else stamped())
    backward.send(None if input_gradient is None else stamped())
