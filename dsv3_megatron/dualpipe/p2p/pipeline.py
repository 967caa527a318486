"""`PipelineP2P`: the messages of one pipeline, for the lifetime of the process groups."""

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dsv3_megatron.dualpipe.p2p.communicators import carrier, gloo_groups, nccl_group
from dsv3_megatron.dualpipe.p2p.gloo import GlooTransport
from dsv3_megatron.dualpipe.p2p.nccl import NcclTransport
from dsv3_megatron.dualpipe.p2p.transport import Ends, TensorSpec, Transport
from dsv3_megatron.pipeline import Message, Operation, Schedule, host_operations
from dsv3_megatron.pipeline.operations import RECEIVES_AHEAD, Backend

MAX_CTAS = 2  # of an NCCL kernel for messages
_open: "weakref.WeakSet[PipelineP2P]" = weakref.WeakSet()


class PipelineP2P:
    """The messages of one pipeline; see `dsv3_megatron.pipeline.stage.Messages` for what the runner asks of it.

    All ranks of the job construct this object at the same time: with it every pipeline's communicators are made, by all
    ranks in one order (so that they have the same names everywhere), and used for the first time, so that no
    communicator and no connection is made inside a step.

    Args:
        ranks: global ranks of this rank's pipeline, by pipeline rank.
        tensor_spec: shape and dtype of a message.
        device: of received tensors.
        timeout_s: a message that takes longer is late. On gloo that is a `PipelineTimeout` of the rank that waits; on
            NCCL only the device waits, and the watch (`dsv3_megatron.resilience.watch`) asks `late_message`.
        receives_ahead: gloo: receives kept posted on each channel, at least 1. Each holds a buffer.
        pipelines: the ranks of all pipelines of the job, in one order; default: this one, which must then be the job.
        max_ctas: NCCL: the most thread blocks of a message's kernel. A kernel that waits for its other end occupies
            a multiprocessor with each.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        tensor_spec: TensorSpec,
        device: torch.device | str | int = "cpu",
        timeout_s: float = 300.0,
        receives_ahead: int = RECEIVES_AHEAD,
        pipelines: Sequence[Sequence[int]] | None = None,
        max_ctas: int = MAX_CTAS,
    ) -> None:
        if receives_ahead < 1:
            raise ValueError(f"receives_ahead={receives_ahead}: at least 1 receive must be posted")
        if max_ctas < 1:
            raise ValueError(f"max_ctas={max_ctas}: a kernel has at least 1 thread block")
        self.ranks = list(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.timeout_s = timeout_s
        self.backend: Backend = carrier()
        self._spec = tensor_spec
        self._receives_ahead = receives_ahead
        pipelines = [self.ranks] if pipelines is None else pipelines
        ends = Ends(self.rank, self.ranks, tensor_spec, device, timeout_s)
        self._transport: Transport
        if self.backend == "nccl":
            self._transport = NcclTransport(ends, nccl_group(self.ranks, pipelines, timeout_s, max_ctas))
        else:
            self._transport = GlooTransport(ends, gloo_groups(self.ranks, pipelines, timeout_s))
        _open.add(self)

    def operations(self, schedule: Schedule) -> list[Operation]:
        """What this rank issues in a step of `schedule`."""
        return host_operations(schedule, self.rank, self.backend, self._receives_ahead)

    def begin(self) -> None:
        """Start a step."""
        self._transport.begin()

    def post(self, operation: Operation) -> None:
        """Issue a batch, isend or irecv: the next of `operations`."""
        self._transport.post(operation)

    def buffer(self, message: Message) -> torch.Tensor:
        """The tensor that `message` is received in. Its values are there behind `wait`."""
        return self._transport.buffer(message)

    def wait(self, messages: Sequence[Message]) -> None:
        """Wait for `messages`: on NCCL the current stream does, on gloo the caller.

        Raises:
            PipelineTimeout: one did not arrive within `timeout_s` (gloo).
        """
        self._transport.wait(messages)

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """Hand over what `message` carries, computed on the current stream, and return at once.

        `tensor` is kept until the receiver has it, and must not change before.

        Raises:
            ValueError: another shape or dtype than the receiver expects.
        """
        shape, dtype = self._spec(message)
        if tensor.shape != torch.Size(shape) or tensor.dtype != dtype:
            raise ValueError(
                f"{message}: got {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {tuple(shape)}"
            )
        self._transport.send(message, tensor.detach().contiguous())

    def finish(self) -> None:
        """End a step. Sends may still be under way.

        Raises:
            PipelineTimeout: one was not taken within `timeout_s` (gloo).
        """
        self._transport.finish()

    def late_message(self) -> str | None:
        """What has been under way for longer than `timeout_s`, for whoever asks regularly from a thread; else None."""
        return self._transport.late()


def late_message() -> str | None:
    """`PipelineP2P.late_message` of any pipeline of this process."""
    return next((late for p2p in list(_open) if (late := p2p.late_message()) is not None), None)
