"""A pipeline stage that takes a declared time: it sleeps, so that many ranks can share few cores.

A message is a small tensor whose first element is the `time.perf_counter()` at which it left (one clock for
all processes of a host), and a stage behind a link of latency `p2p` starts no earlier than that much later.
The same modules run under this package's runner and under Megatron's own schedules.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .autograd_stage import WeightGradients
from .stage import Half

MESSAGE_SHAPE = (8, 1, 1)  # as Megatron sends it: sequence, microbatch size, hidden
MESSAGE_DTYPE = torch.float64  # of the time stamps


_WAKE_UP = 1.5e-4  # seconds


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
    """Sleeps in an autograd Function's forward, input backward and weight backward."""

    def __init__(self, durations: Durations, weight_gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.ones(1, dtype=MESSAGE_DTYPE)
        )  # makes the output of a first stage need gradients
        self.durations = durations
        self.weight_gradients = weight_gradients

    def forward(self, x: Tensor) -> Tensor:
        """MESSAGE_SHAPE to MESSAGE_SHAPE."""
        return _Sleep.apply(x, self.weight, self)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        _arrive(x, stage.durations.activation_latency)
        take(stage.durations.forward)
        return stamped()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        durations = ctx.stage.durations
        _arrive(gradient, durations.gradient_latency)
        take(durations.backward_input)
        ctx.stage.weight_gradients.put(lambda: take(durations.backward_weight))
        return stamped(), None, None


def _arrive(message: Tensor, latency: float) -> None:
    """Wait until `message` has crossed its link."""
    if latency > 0:
        take(message.flatten()[0].item() + latency - time.perf_counter())


def take(seconds: float) -> None:
    """Let exactly this time pass: asleep, but for the last moment, since a sleeper wakes up ~0.1 ms late."""
    end = time.perf_counter() + seconds
    if seconds > _WAKE_UP:
        time.sleep(seconds - _WAKE_UP)
    while time.perf_counter() < end:
        pass


def stamped() -> Tensor:
    """A message that leaves now."""
    return torch.full(MESSAGE_SHAPE, time.perf_counter(), dtype=MESSAGE_DTYPE)


def as_one_block(forward: Half, backward: Half) -> None:
    """An overlapped pair as the tables have it: starts with both inputs, and both results leave at its
    end."""
    activation, gradient = forward.receive(), backward.receive()
    output = forward.stage.forward(forward.which, activation)
    input_gradient = backward.stage.backward(backward.which, gradient)
    forward.send(None if output is None else stamped())
    backward.send(None if input_gradient is None else stamped())
