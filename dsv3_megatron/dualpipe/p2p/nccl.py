"""Messages on NCCL: batches on one communicator, on a stream of their own; only the device waits."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.dualpipe.p2p.transport import Ends, did_not_arrive
from dsv3_megatron.pipeline import Message, Operation


@dataclass(eq=False)
class _Batch:
    """A batch under way. Its tensors are kept until it is done."""

    operation: Operation
    works: list[Any]
    tensors: list[torch.Tensor] = field(default_factory=list)

    def is_done(self) -> bool:
        """Asks an event, and waits for nothing."""
        return all(work.is_completed() for work in self.works)


class NcclTransport:
    """See `PipelineP2P`. Nothing here makes the host wait.

    Batches are issued on a stream of their own, which waits for the events behind which the sent tensors are there; so
    a receive does not wait for what is being computed. NCCL's stream follows this one, and the computing stream waits
    for a batch's end only where a message of it is used.

    Args:
        group: one communicator of the whole pipeline, in use.
    """

    def __init__(self, ends: Ends, group: dist.ProcessGroup) -> None:
        self._ends = ends
        self._group = group
        self._device = torch.cuda.current_device()
        _, high = torch.cuda.Stream.priority_range()
        self._stream = torch.cuda.Stream(priority=high)
        self._handed: dict[Message, tuple[torch.Tensor, Any]] = {}
        self._received: dict[Message, tuple[torch.Tensor, _Batch]] = {}
        self._under_way: deque[_Batch] = deque()
        self._oldest: tuple[_Batch | None, float] = (None, 0.0)  # as last seen by `late`, and since when

    def begin(self) -> None:
        assert not self._handed and not self._received, "the last step has not ended"

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        self._handed[message] = tensor, torch.cuda.current_stream().record_event()

    def post(self, operation: Operation) -> None:
        while self._under_way and self._under_way[0].is_done():
            self._under_way.popleft()
        batch = _Batch(operation, [])
        posts = []
        with torch.cuda.stream(self._stream):
            for message in operation.sends:
                tensor, ready = self._handed.pop(message)
                self._stream.wait_event(ready)
                posts.append(self._post(dist.isend, tensor, message.channel.destination))
            for message in operation.receives:
                # Memory of this stream: memory of the computing one may still be in use there.
                buffer = self._ends.empty(message)
                self._received[message] = buffer, batch
                posts.append(self._post(dist.irecv, buffer, message.channel.source))
            batch.tensors = [post.tensor for post in posts]
            batch.works = dist.batch_isend_irecv(posts)
        self._under_way.append(batch)

    def buffer(self, message: Message) -> torch.Tensor:
        return self._received[message][0]

    def wait(self, messages: Sequence[Message]) -> None:
        for message in messages:
            buffer, batch = self._received.pop(message)
            try:
                for work in batch.works:
                    work.wait()  # without a limit: orders the current stream behind it
            except RuntimeError as error:
                raise did_not_arrive(self._ends.rank, message, self._ends.timeout_s) from error
            # It goes back to the memory of the messages' stream, not before this stream has used it.
            buffer.record_stream(torch.cuda.current_stream())

    def finish(self) -> None:
        left = [str(message) for message in (*self._handed, *self._received)]
        assert not left, f"left on pipeline rank {self._ends.rank}: {left}"

    def late(self) -> str | None:
        """Called by one thread beside the computing one. A batch counts from when it was first seen as the oldest."""
        now = time.monotonic()
        # That thread begins on device 0, where asking an event would open another context.
        with torch.cuda.device(self._device):
            oldest = next((batch for batch in list(self._under_way) if not batch.is_done()), None)
        if oldest is None or oldest is not self._oldest[0]:
            self._oldest = oldest, now
            return None
        if now - self._oldest[1] <= self._ends.timeout_s:
            return None
        sends = [f"nobody took {message}" for message in oldest.operation.sends]
        receives = [f"got no {message}" for message in oldest.operation.receives]
        return (
            f"pipeline rank {self._ends.rank} waits for longer than {self._ends.timeout_s:g} s: "
            f"{', '.join(receives + sends)}"
        )

    def _post(self, operation: Any, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, self._ends.ranks[peer], self._group)
