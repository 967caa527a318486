"""What carries messages: the part that differs between NCCL and gloo."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dsv3_megatron.pipeline import Message, Operation

TensorSpec = Callable[[Message], tuple[Sequence[int], torch.dtype]]


class PipelineTimeout(RuntimeError):
    """A message was late; the text names rank, stage, direction and microbatch."""


def did_not_arrive(rank: int, message: Message, timeout_s: float) -> PipelineTimeout:
    """The error of a message that `rank` waits for."""
    return PipelineTimeout(
        f"pipeline rank {rank} got no {message} within {timeout_s:g} s; a rank of the pipeline has failed or is slower "
        "than the time limit"
    )


@dataclass(frozen=True)
class Ends:
    """What a transport needs to know of its pipeline.

    Attributes:
        rank: of this process in the pipeline.
        ranks: global ranks, by pipeline rank.
        spec: shape and dtype of a message.
        device: of received tensors.
        timeout_s: a message that takes longer is late.
    """

    rank: int
    ranks: Sequence[int]
    spec: TensorSpec
    device: torch.device | str | int
    timeout_s: float

    def empty(self, message: Message) -> torch.Tensor:
        """A buffer for `message`."""
        shape, dtype = self.spec(message)
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


class Transport(Protocol):
    """See `PipelineP2P`, whose methods of the same names check and call these."""

    def begin(self) -> None: ...

    def post(self, operation: Operation) -> None: ...

    def buffer(self, message: Message) -> torch.Tensor: ...

    def wait(self, messages: Sequence[Message]) -> None: ...

    def send(self, message: Message, tensor: torch.Tensor) -> None: ...

    def finish(self) -> None: ...

    def late(self) -> str | None: ...
