"""What the runner asks of a model chunk, be it Megatron's, a toy module or one that sleeps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .actions import Action, Schedule
from .comms import Message
from .operations import Operation


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


class EarlyStage(Stage, Protocol):
    """A stage that can hand the gradient of a full backward on before its last weight gradients."""

    def backward_and_send(
        self, which: Pass, gradient: Tensor | None, send: Callable[[Tensor | None], None]
    ) -> None:
        """As `backward`, but calls `send` once with the gradient of the activation, as soon as it is there."""


class Messages(Protocol):
    """The messages of one pipeline, as `dsv3_megatron.dualpipe.p2p.PipelineP2P` carries them."""

    def operations(self, schedule: Schedule) -> list[Operation]:
        """What this rank issues in a step: `host_operations` for the backend that carries the messages."""

    def begin(self) -> None:
        """Start a step."""

    def post(self, operation: Operation) -> None:
        """Issue a batch, isend or irecv, which is the next of the list; what it sends has been handed to `send`."""

    def buffer(self, message: Message) -> Tensor:
        """What `message` will be in, once waited for; its receive is posted."""

    def wait(self, messages: Sequence[Message]) -> None:
        """What follows uses these messages: wait for them, the device if it can, else the host."""

    def send(self, message: Message, tensor: Tensor) -> None:
        """Hand over what `message` will carry, and return at once. It is there for the stream that calls this."""

    def finish(self) -> None:
        """End a step."""


@dataclass(frozen=True, slots=True)
class Half:
    """One half of an overlapped pair, with its ends to the pipeline.

    Attributes:
        stage: computes `which`.
        input: its input (activation or gradient), which is not there before `receive` has been called; None at an end
            of the pipeline. For whatever needs the tensor but not its values, while the message is under way.
        receive: waits for the inputs of the pair and returns this one; call once.
        send: hands the result on; call once, as soon as it is there.
    """

    stage: Stage
    which: Pass
    input: Tensor | None
    receive: Callable[[], Tensor | None]
    send: Callable[[Tensor | None], None]


Overlap = Callable[[Half, Half], None]  # runs the forward half and the backward half of a pair


def one_after_the_other(forward: Half, backward: Half) -> None:
    """The pair without overlap. The output leaves before the backward starts."""
    forward.send(forward.stage.forward(forward.which, forward.receive()))
    backward.send(backward.stage.backward(backward.which, backward.receive()))
