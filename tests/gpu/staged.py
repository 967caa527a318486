"""`staged`: a torch.distributed backend for several ranks that share a GPU, where NCCL has none (before 2.30).

Tensors are copied to pinned memory on a stream of their own, gloo carries them, and they are copied back on another
stream. Each operation returns at once. `Work.wait` blocks the host until gloo has finished (NCCL's would not) and then
makes the current stream wait for the copy. Without a GPU the CPU runtime's stand-in streams take the streams' place.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.cpu import distributed

NAME = "staged"
ReduceOp = dist.ReduceOp


class StagedWork(dist.Work):
    """One operation; finished when the copy of its results has been issued."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._copied: Any = None
        self._keep = keep  # tensors that must live until the end

    def end(self, copied: Any = None, error: BaseException | None = None) -> None:
        self._copied, self._error, self._keep = copied, error, None
        self._finished.set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        seconds = timeout.total_seconds() if timeout else None
        if not self._finished.wait(seconds or None):
            raise RuntimeError(f"staged: timed out after {seconds:g} s")
        if self._error is not None:
            raise self._error
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        return True

    def is_completed(self) -> bool:
        copied = self._copied
        return self._finished.is_set() and (copied is None or copied.query())

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def synchronize(self) -> None:
        self.wait()


class _Lane:
    """Runs jobs one after the other in a thread of its own, made with the first of them."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _serve(self) -> None:
        while True:
            self._jobs.get()()


class StagedGroup(dist.ProcessGroup):
    """A process group of the backend; `gloo` carries it. Names are those of torch 2.11 and of torch 2.14."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._gloo, self._size = gloo, size
        self._collectives, self._sends = (
            _Lane(),
            _Lane(),
        )  # gloo takes both in the order in which they are posted
        self._streams: dict[str, Any] = {}

    # --- what torch asks of a group

    def getBackendName(self) -> str:
        return NAME

    def _get_backend(self, device: Any) -> Any:
        return self._gloo  # cannot coalesce, like this one

    def set_timeout(self, timeout: timedelta) -> None:
        pass

    def shutdown(self) -> None:
        pass

    abort = shutdown

    # --- collectives

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> StagedWork:
        operation = _operation(opts)
        return self._collective(
            tensors, tensors, lambda out, _: [self._reduced(host, operation) for host in out]
        )

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> StagedWork:
        return self._collective(tensors, tensors, lambda out, _: self._gloo.broadcast(out, opts).wait())

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> StagedWork:
        return self.allreduce(tensors, opts)  # others than the root's are undefined afterwards

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> StagedWork:
        flat = [tensor for tensors in outputs for tensor in tensors]

        def gather(out: list[Tensor], given: list[Tensor]) -> None:
            for i, host in enumerate(given):
                self._gloo.allgather([out[i * self._size : (i + 1) * self._size]], [host]).wait()

        return self._collective(flat, inputs, gather)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> StagedWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> StagedWork:
        def gather(out: list[Tensor], given: list[Tensor]) -> None:
            for whole, part in zip(out, given, strict=True):
                self._gloo.allgather([list(whole.flatten().chunk(self._size))], [part.flatten()]).wait()

        return self._collective(outputs, inputs, gather)

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> StagedWork:
        whole = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in inputs]
        return self.reduce_scatter_single_coalesced(outputs, whole, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> StagedWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> StagedWork:
        operation, rank = _operation(opts), self.rank()

        def scatter(out: list[Tensor], given: list[Tensor]) -> None:
            for part, whole in zip(out, given, strict=True):
                self._reduced(whole, operation)
                part.copy_(whole.flatten().chunk(self._size)[rank].view_as(part))

        return self._collective(outputs, inputs, scatter)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> StagedWork:
        name = "alltoall_base" if hasattr(self._gloo, "alltoall_base") else "all_to_all_single"
        exchange = getattr(self._gloo, name)
        options = opts if opts is not None else dist.AllToAllOptions()
        return self._collective(
            [output],
            [input],
            lambda out, given: exchange(
                out[0], given[0], list(output_splits), list(input_splits), options
            ).wait(),
        )

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> StagedWork:
        flat = [tensor for tensors in outputs for tensor in tensors]
        return self._collective(
            flat, inputs, lambda out, given: self._gloo.gather([out] if out else [], given, opts).wait()
        )

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> StagedWork:
        flat = [tensor for tensors in inputs for tensor in tensors]
        return self._collective(
            outputs, flat, lambda out, given: self._gloo.scatter(out, [given] if given else [], opts).wait()
        )

    def barrier(self, opts: Any = None) -> StagedWork:
        return self.allreduce([torch.zeros(1)])

    # Their names before torch 2.14.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # --- messages

    def send(self, tensors: Sequence[Tensor], destination: int, tag: int) -> StagedWork:
        (tensor,) = tensors
        before, work = _now(), StagedWork(tensors)

        def post() -> None:
            try:
                (host,) = self._bring_out([tensor], before, self._stream("sends"))
                posted = self._gloo.send([_bytes(host)], destination, tag)
            except BaseException as error:
                work.end(error=error)
                return
            _when_done(posted, work, lambda: None)

        self._sends.put(post)
        return work

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> StagedWork:
        (tensor,) = tensors
        host, before, work = _pinned(tensor), _now(), StagedWork(tensors)
        stream = self._stream("receives")
        posted = self._gloo.recv([_bytes(host)], source, tag)
        _when_done(posted, work, lambda: self._bring_back([tensor], [host], before, stream))
        return work

    # --- staging

    def _collective(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        carry: Callable[[list[Tensor], list[Tensor]], Any],
    ) -> StagedWork:
        """Stage `inputs`, let `carry` fill host tensors for `outputs` (the same ones where they are the inputs)."""
        outputs, inputs = list(outputs), list(inputs)
        in_place = len(outputs) == len(inputs) and all(a is b for a, b in zip(outputs, inputs, strict=True))
        before, work, stream = _now(), StagedWork((outputs, inputs)), self._stream("collectives")

        def job() -> None:
            try:
                given = self._bring_out(inputs, before, stream)
                found = given if in_place else [_pinned(tensor) for tensor in outputs]
                with torch.no_grad():
                    carry(found, given)
                work.end(self._bring_back(outputs, found, before, stream))
            except BaseException as error:
                work.end(error=error)

        self._collectives.put(job)
        return work

    def _bring_out(self, tensors: Sequence[Tensor], before: Any, stream: Any) -> list[Tensor]:
        """Copies in pinned memory, of what the tensors are behind `before` and what `stream` did earlier."""
        hosts = [_pinned(tensor) for tensor in tensors]
        self._copy(zip(hosts, tensors, strict=True), before, stream).synchronize()
        return hosts

    def _bring_back(
        self, tensors: Sequence[Tensor], hosts: Sequence[Tensor], before: Any, stream: Any
    ) -> Any:
        """Copy results back behind `before`; returns the event behind which they are there."""
        pairs = [(t, host.view(t.shape)) for t, host in zip(tensors, hosts, strict=True)]
        return self._copy(pairs, before, stream)

    def _copy(self, pairs: Iterable[tuple[Tensor, Tensor]], before: Any, stream: Any) -> Any:
        with torch.no_grad(), torch.cuda.stream(stream):  # of this stream's device, also in a thread
            stream.wait_event(before)
            for target, source in pairs:
                # As NCCL writes: unseen by autograd, which may have saved the tensor (tokens, for an embedding).
                target.data.copy_(source, non_blocking=True)
                for tensor in (target, source):
                    if tensor.is_cuda:
                        tensor.record_stream(stream)
            copied = torch.cuda.Event()
            copied.record(stream)
        return copied

    def _stream(self, what: str) -> Any:
        """A stream for each kind: what has arrived must not wait for what is still computed."""
        if what not in self._streams:
            self._streams[what] = torch.cuda.Stream()
        return self._streams[what]

    def _reduced(self, host: Tensor, operation: Any) -> Tensor:
        """All-reduce in place; gloo knows no average."""
        options = dist.AllreduceOptions()
        average = operation == ReduceOp.AVG
        options.reduceOp = ReduceOp.SUM if average else operation
        self._gloo.allreduce([host], options).wait()
        return host.div_(self._size) if average else host


def _now() -> Any:
    """An event of the caller's stream as it is."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream())
    return event


def _when_done(posted: Any, work: StagedWork, bring_back: Callable[[], Any]) -> None:
    """End `work` when gloo has ended: in a thread, since gloo says so only to whoever waits."""

    def wait() -> None:
        try:
            posted.wait()
            work.end(bring_back())
        except BaseException as error:
            work.end(error=error)

    threading.Thread(target=wait, daemon=True).start()


def _operation(opts: Any) -> Any:
    return ReduceOp.SUM if opts is None else opts.reduceOp


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)


def _bytes(host: Tensor) -> Tensor:
    """Gloo's messages take few dtypes; these carry bytes."""
    return host.view(-1).view(torch.uint8) if host.numel() else host.view(-1)


def register() -> None:
    """Make `backend="staged"` known to torch.distributed, for tensors of GPUs and of the CPU. Idempotent."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _make, devices=["cpu", "cuda"])
    if NAME not in distributed.KEPT_BACKENDS:  # the CPU runtime would make gloo of it
        distributed.KEPT_BACKENDS += (NAME,)  # type: ignore[assignment]


def _make(store: Any, rank: int, size: int, timeout: timedelta) -> StagedGroup:
    return StagedGroup(dist.distributed_c10d.ProcessGroupGloo(store, rank, size, timeout=timeout), rank, size)


def install() -> None:
    """From here on `nccl` means `staged` in this process: for programs, such as Megatron, that name NCCL themselves."""
    register()
    init, new_group = dist.init_process_group, dist.new_group

    def staged_init(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        return init(_renamed(backend), *args, **kwargs)

    def staged_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **kwargs: Any
    ) -> Any:
        kwargs.pop("device_id", None)
        return new_group(ranks, timeout, _renamed(backend), None, **kwargs)

    dist.init_process_group, dist.new_group = staged_init, staged_group


def _renamed(backend: Any) -> Any:
    return NAME if backend == "nccl" else backend
