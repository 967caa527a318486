"""What the runner asks of a model chunk, be it Megatron's, a toy module or one that sleeps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .actions import Action
from .comms import Channel, Message


@dataclass(frozen=True, slots=True)
class Pass:
    """A single computation that the runner asks a stage for.

    Attributes:
        action: F, B, B-input or W, with stage, direction and microbatch.
        first: the first forward of this stage on this rank in the step.
        last: the last computation that adds to the weight gradients of this stage on this rank: when it
            returns, they are complete and may be reduced.
    """

    action: Action
    first: bool
    last: bool

    @property
    def microbatch(self) -> int:
        return self.action.microbatch


class Stage(Protocol):
    """One stage on one rank. Between a microbatch's forward and its backward the stage keeps what it needs.

    An activation is the input from the previous stage: a leaf tensor that the stage owns, or None on the
        first stage.
    A gradient is that of the stage's output, or None on the last stage, whose forward ends with the loss.
    """

    def forward(self, which: Pass, activation: Tensor | None) -> Tensor | None:
        """Return the output for the next stage; None from the last stage."""

    def backward(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        """Add the weight gradients; return the gradient of the activation, None from the first stage."""

    def backward_input(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient of the activation, and keep what `backward_weight` needs."""

    def backward_weight(self, which: Pass) -> None:
        """Add the weight gradients that `backward_input` kept for this microbatch."""


class Messages(Protocol):
    """The channels of one pipeline, as `dsv3_megatron.dualpipe.p2p.PipelineP2P` has them."""

    def begin(self, receives: Mapping[Channel, Sequence[Message]]) -> None:
        """Start a step: this rank's messages of each channel, in the order of arrival."""

    def receive(self, message: Message) -> Tensor:
        """Wait for `message`, which must be the next of its channel."""

    def send(self, message: Message, tensor: Tensor) -> None:
        """Post `message` and return at once."""

    def finish(self) -> None:
        """End a step."""


@dataclass(frozen=True, slots=True)
class Half:
    """One half of an overlapped pair, with its ends to the pipeline.

    Attributes:
        stage: computes `which`.
        receive: waits for the input (activation or gradient) and returns it; call once.
        send: hands the result on; call once, as soon as it is there.
    """

    stage: Stage
    which: Pass
    receive: Callable[[], Tensor | None]
    send: Callable[[Tensor | None], None]


Overlap = Callable[[Half, Half], None]  # runs the forward half and the backward half of a pair


def one_after_the_other(forward: Half, backward: Half) -> None:
    """The pair without overlap. The output leaves before the backward starts, and the gradient may come
    late."""
    forward.send(forward.stage.forward(forward.which, forward.receive()))
    backward.send(backward.stage.backward(backward.which, backward.receive()))
