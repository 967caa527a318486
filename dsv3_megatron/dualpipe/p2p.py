"""Messages between pipeline ranks in the background: receives are posted ahead, sends are nobody's wait."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from dsv3_megatron.pipeline.comms import Channel, Message

TensorSpec = Callable[[Message], tuple[Sequence[int], torch.dtype]]


class PipelineTimeout(RuntimeError):
    """A message was late; the text names rank, stage, direction and microbatch."""


class PipelineP2P:
    """The channels of one pipeline, for the lifetime of the process groups.

    Each one-way channel class (activations or gradients, down or up the ranks) has a process group of its
    own: on NCCL a group's operations between two ranks run in the order in which they are posted, so a
        receive posted
    ahead would hold up whatever shares its group.

    Args:
        ranks: global ranks of this pipeline, by pipeline rank. All of them construct this object at the same
            time; no other rank takes part.
        tensor_spec: shape and dtype of a message.
        device: of received tensors.
        timeout_s: a receive or send that takes longer is a `PipelineTimeout`.
        receives_ahead: receives kept posted on each channel, at least 1. Each holds a buffer.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        tensor_spec: TensorSpec,
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
        receives_ahead: int = 2,
    ) -> None:
        if receives_ahead < 1:
            raise ValueError(f"receives_ahead={receives_ahead}: at least 1 receive must be posted")
        self.ranks = list(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.timeout_s = timeout_s
        self._tensor_spec = tensor_spec
        self._device = device
        self._receives_ahead = receives_ahead
        self._groups = {
            (payload, down): dist.new_group(
                sorted(self.ranks), use_local_synchronization=True, timeout=timedelta(seconds=timeout_s)
            )
            for payload in ("activation", "gradient")
            for down in (True, False)
        }
        self._to_post: dict[Channel, deque[Message]] = {}
        self._posted: dict[Channel, deque[tuple[Message, torch.Tensor, dist.Work]]] = {}
        self._sends = _SendReaper(self.rank, timeout_s)

    def begin(self, receives: Mapping[Channel, Sequence[Message]]) -> None:
        """Start a step: `receives` are this rank's messages of each channel, in the order of arrival."""
        self._to_post = {channel: deque(messages) for channel, messages in receives.items()}
        self._posted = {channel: deque() for channel in receives}
        for channel in receives:
            for _ in range(self._receives_ahead):
                self._post(channel)

    def receive(self, message: Message) -> torch.Tensor:
        """Wait for `message`, which must be the next of its channel.

        Raises:
            PipelineTimeout: it did not arrive within `timeout_s`.
        """
        self._sends.check()
        expected, buffer, work = self._posted[message.channel].popleft()
        assert expected == message, f"rank {self.rank} wants {message}, next on the channel is {expected}"
        try:
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise PipelineTimeout(
                f"pipeline rank {self.rank} got no {message} within {self.timeout_s:g} s; a rank of the "
                "pipeline has failed or is slower than the time limit"
            ) from error
        if buffer.is_cuda:
            # NCCL's wait only ordered the streams; somebody has to notice when nothing ever comes.
            self._sends.add(message, work, buffer)
        self._post(message.channel)
        return buffer

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """Post `message` and return at once; `tensor` is kept until the receiver has it."""
        shape, dtype = self._tensor_spec(message)
        if tensor.shape != torch.Size(shape) or tensor.dtype != dtype:
            raise ValueError(
                f"{message}: got {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {tuple(shape)}"
            )
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self.ranks[message.channel.destination], group=self._group(message.channel))
        self._sends.add(message, work, tensor)

    def finish(self) -> None:
        """End a step: wait until all sends are taken.

        Raises:
            PipelineTimeout: one was not, within `timeout_s`.
        """
        self._sends.drain()

    def _post(self, channel: Channel) -> None:
        if not self._to_post[channel]:
            return
        message = self._to_post[channel].popleft()
        shape, dtype = self._tensor_spec(message)
        buffer = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        work = dist.irecv(buffer, self.ranks[channel.source], group=self._group(channel))
        self._posted[channel].append((message, buffer, work))

    def _group(self, channel: Channel) -> dist.ProcessGroup:
        return self._groups[channel.payload, channel.source < channel.destination]


class _SendReaper:
    """Waits for sends (on NCCL for awaited receives too) in a thread, in order, and lets their tensors go.

    A gloo send is finished only by waiting for it, which the computing thread must not do. On NCCL waiting would order
    the computing stream behind the message, so there the thread asks until it is complete.
    """

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
                    self._wait(work, tensor)
            except RuntimeError as error:
                verb = "send" if message.channel.source == self._rank else "receive"
                self._error = PipelineTimeout(
                    f"pipeline rank {self._rank} could not {verb} {message} within {self._timeout_s:g} s; a "
                    "rank of the pipeline has failed or is slower than the time limit"
                )
                self._error.__cause__ = error
            finally:
                del message, work, tensor
                self._pending.task_done()

    def _wait(self, work: dist.Work, tensor: torch.Tensor) -> None:
        if not tensor.is_cuda:
            work.wait(timedelta(seconds=self._timeout_s))
            return
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError("the work did not complete")
            time.sleep(1e-4)
