"""Messages on gloo: receives are posted ahead, sends are nobody's wait, and the host waits."""

import queue
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from dsv3_megatron.dualpipe.p2p.communicators import ClassGroups
from dsv3_megatron.dualpipe.p2p.transport import Ends, PipelineTimeout, did_not_arrive
from dsv3_megatron.pipeline import Message, Operation
from dsv3_megatron.pipeline.comms import Channel


class GlooTransport:
    """See `PipelineP2P`.

    Args:
        groups: one for each payload and way along the ranks.
    """

    def __init__(self, ends: Ends, groups: ClassGroups) -> None:
        self._ends = ends
        self._groups = groups
        self._received: dict[Message, tuple[torch.Tensor, dist.Work]] = {}
        self._sent: set[Message] = set()
        self._sends = _SendReaper(ends.rank, ends.timeout_s)

    def begin(self) -> None:
        self._sends.drain()  # those of the last step

    def post(self, operation: Operation) -> None:
        for message in operation.sends:
            self._sent.remove(message)  # posted when it was handed over
        for message in operation.receives:
            buffer = self._ends.empty(message)
            work = dist.irecv(
                buffer, self._ends.ranks[message.channel.source], group=self._group(message.channel)
            )
            self._received[message] = buffer, work

    def buffer(self, message: Message) -> torch.Tensor:
        return self._received[message][0]

    def wait(self, messages: Sequence[Message]) -> None:
        self._sends.check()
        for message in messages:
            _, work = self._received.pop(message)
            try:
                work.wait(timedelta(seconds=self._ends.timeout_s))
            except RuntimeError as error:
                raise did_not_arrive(self._ends.rank, message, self._ends.timeout_s) from error

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        work = dist.isend(
            tensor, self._ends.ranks[message.channel.destination], group=self._group(message.channel)
        )
        self._sends.add(message, work, tensor)
        self._sent.add(message)

    def finish(self) -> None:
        self._sends.check()
        left = [str(message) for message in (*self._sent, *self._received)]
        assert not left, f"left on pipeline rank {self._ends.rank}: {left}"

    def late(self) -> str | None:
        return None  # the waiting rank raises

    def _group(self, channel: Channel) -> dist.ProcessGroup:
        return self._groups[channel.payload, channel.source < channel.destination]


class _SendReaper:
    """Waits for sends in a thread, in order, and lets their tensors go: a gloo send is finished only by waiting."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._pending: queue.Queue[tuple[Message, dist.Work, torch.Tensor]] = queue.Queue()
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="pipeline-sends", daemon=True).start()

    def add(self, message: Message, work: dist.Work, tensor: torch.Tensor) -> None:
        self._pending.put((message, work, tensor))

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        self._pending.join()
        self.check()

    def _run(self) -> None:
        while True:
            message, work, tensor = self._pending.get()
            try:
                if self._error is None:
                    work.wait(timedelta(seconds=self._timeout_s))
            except RuntimeError as error:
                self._error = PipelineTimeout(
                    f"pipeline rank {self._rank} could not send {message} within {self._timeout_s:g} s; a rank of the "
                    "pipeline has failed or is slower than the time limit"
                )
                self._error.__cause__ = error
            finally:
                del message, work, tensor
                self._pending.task_done()
