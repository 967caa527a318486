"""A record of which stand-in stream wrote and read what: finds missing waits, where a GPU would only race.

    with record_streams() as record:
        ...
    assert not record.violations

Every stream has a vector clock: what it is ordered after, as the number of operations of each other stream.
Events, `wait_stream` and synchronisation merge clocks. An access is a violation when the clock of its stream
does not cover an earlier conflicting access of the same bytes (the idea of `torch.cuda._sanitizer`).

- A collective runs on a stream of its process group (point-to-point: of the peer), after what its issuing
  stream did before; `Work.wait()` orders the waiting stream after it. So a result used before `wait()` is a
  violation.
- An operation of a backward pass belongs to the stream of its forward operation, which is found by the
  sequence number of its autograd node. Autograd orders the streams of one backward pass by itself.
- Not recorded: the reuse of freed memory (`Tensor.record_stream`), reads by the host other than `.item()` and
  its like, other threads. Strided views count with their whole extent.
"""

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch.autograd import Variable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3_megatron.cpu import streams

Clock = dict[Any, int]

# ProcessGroup methods (old and new names) by the roles of their first arguments.
IN_PLACE = ("allreduce", "allreduce_coalesced", "broadcast", "reduce")
OUTPUT_INPUT = (
    "allgather", "_allgather_base", "all_gather_single", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "all_gather_single_coalesced", "reduce_scatter", "_reduce_scatter_base",
    "reduce_scatter_single", "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced", "alltoall",
    "alltoall_base", "all_to_all_single", "gather", "gather_single", "scatter",
)  # fmt: skip
SEND, RECEIVE = ("send",), ("recv", "recv_anysource")

# Classes whose `wait` orders a stream; `like_nccl` adds its own.
WORKS: list[type] = [torch.distributed.Work]

# On a GPU these wait for their stream before they return to the host.
HOST_WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
)
EMPTY = (
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
)


@dataclass(frozen=True)
class Access:
    stream: Any
    time: int
    operation: str
    location: str

    def __str__(self) -> str:
        return f"{self.operation} on {self.stream} at {self.location}"


@dataclass(frozen=True)
class Violation:
    """`second` is not ordered after `first`, and at least one of them writes. `tensor` is that of `second`."""

    tensor: str
    first: Access
    second: Access

    def __str__(self) -> str:
        return f"{self.tensor}: {self.second} does not wait for {self.first}"


@dataclass
class _Interval:
    write: Access | None = None
    reads: dict[Any, Access] = field(default_factory=dict)


class Recorder:
    """What `record_streams()` yields.

    Attributes:
        violations: one `Violation` per distinct pair of operations and places.
        num_operations: recorded operations of each stream: a test can see that it has tested something.
    """

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self._seen: set[tuple[str, ...]] = set()
        self._clocks: defaultdict[Any, Clock] = defaultdict(dict)
        self._host: Clock = {}
        # Storage (kept from reuse by the weak reference) -> byte range -> accesses.
        self._history: dict[int, tuple[StorageWeakRef, dict[tuple[int, int], _Interval]]] = {}
        self._in_backend = False  # gloo copies with ordinary operations
        self._works: dict[int, tuple[Any, Clock]] = {}
        # Autograd nodes with sequence numbers from `_switch_numbers[i]` on were made on `_switch_streams[i]`.
        self._switch_numbers = [0]
        self._switch_streams = [streams.thread_stream()]
        self._set_in_node: tuple[int, int] | None = None
        self._backward_stream: Any = None
        self._backward_streams: set[Any] = set()

    @property
    def num_operations(self) -> dict[Any, int]:
        return {stream: clock.get(stream, 0) for stream, clock in self._clocks.items()}

    # Ordering

    def clock(self, stream: Any) -> Clock:
        """A copy of what `stream` is ordered after, its own operations included."""
        clock = self._clocks[stream]
        _merge(clock, self._host)
        return dict(clock)

    def order_after(self, stream: Any, clock: Clock) -> None:
        _merge(self._clocks[stream], clock)

    def order_host_after(self, clock: Clock) -> None:
        """Whatever is issued from now on, on any stream, comes after `clock`."""
        _merge(self._host, clock)

    def synchronize(self) -> None:
        for stream in list(self._clocks):
            self.order_host_after(self.clock(stream))

    # Streams of operations

    def current_stream(self) -> Any:
        node = _current_node()
        if node is None or node == self._set_in_node:
            return streams.thread_stream()
        stream = self._backward_stream if node[1] < 0 else self._stream_of_node(node[1])
        if stream is None:
            return streams.thread_stream()
        if stream is not self._backward_stream and self._backward_stream is not None:
            self.order_after(stream, self.clock(self._backward_stream))
            self._backward_stream = stream
            self._backward_streams.add(stream)
        return stream

    def _stream_of_node(self, number: int) -> Any:
        return self._switch_streams[bisect_right(self._switch_numbers, number) - 1]

    def stream_was_set(self) -> None:
        self._set_in_node = _current_node()
        self._switch_numbers.append(torch._C._autograd._get_sequence_nr())
        self._switch_streams.append(streams.thread_stream())

    def run_backward(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        caller = self.current_stream()
        outer = self._backward_stream, self._backward_streams
        self._backward_stream, self._backward_streams = caller, set()
        try:
            return run(*args, **kwargs)
        finally:
            for stream in self._backward_streams:
                self.order_after(caller, self.clock(stream))
            self._backward_stream, self._backward_streams = outer

    # Accesses

    def operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """One ATen operation on the current stream."""
        if self._in_backend:
            return
        schema = func._schema
        reads: list[torch.Tensor] = []
        writes: list[torch.Tensor] = []
        aliases = False
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            (writes if is_write else reads).extend(_tensors(value))
        inputs = {t.untyped_storage()._cdata for t in reads + writes}
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata in inputs:
                aliases = True
            else:
                writes.append(tensor)
        if (aliases and not writes) or schema.name in EMPTY:
            return  # a view, or memory without content
        stream = self.current_stream()
        self.access(stream, schema.name, reads, writes)
        if schema.name in HOST_WAITS:
            self.order_host_after(self.clock(stream))

    def collective(self, stream: Any, name: str, reads: Any, writes: Any, issue: Callable[[], Any]) -> Any:
        self.order_after(stream, self.clock(self.current_stream()))
        self.access(stream, name, _tensors(reads), _tensors(writes))
        work = self.in_backend(issue)
        if work is not None:
            self._works[id(work)] = (work, self.clock(stream))
        else:
            self.order_after(self.current_stream(), self.clock(stream))
        return work

    def in_backend(self, run: Callable[[], Any]) -> Any:
        """Run a part of a collective, whose accesses are recorded as one."""
        self._in_backend = True
        try:
            return run()
        finally:
            self._in_backend = False

    def work_waited(self, work: Any) -> None:
        _, clock = self._works.pop(id(work), (None, {}))
        self.order_after(self.current_stream(), clock)

    def access(self, stream: Any, name: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        clock = self._clocks[stream]
        _merge(clock, self._host)
        clock[stream] = clock.get(stream, 0) + 1
        access = Access(stream, clock[stream], name, _location())
        for tensor in reads:
            self._touch(tensor, access, clock, is_write=False)
        for tensor in writes:
            self._touch(tensor, access, clock, is_write=True)

    def _touch(self, tensor: torch.Tensor, access: Access, clock: Clock, is_write: bool) -> None:
        if tensor.numel() == 0:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._history:
            self._history[storage._cdata] = (StorageWeakRef(storage), {})
        intervals = self._history[storage._cdata][1]
        start, end = _byte_range(tensor)
        for (other_start, other_end), interval in list(intervals.items()):
            if other_end <= start or end <= other_start:
                continue
            conflicts = [interval.write] if interval.write else []
            if is_write:
                conflicts += interval.reads.values()
                if start <= other_start and other_end <= end:
                    del intervals[other_start, other_end]
            for first in conflicts:
                if first is not access and clock.get(first.stream, 0) < first.time:
                    self._report(tensor, first, access)
        interval = intervals.setdefault((start, end), _Interval())
        if is_write:
            interval.write = access
        else:
            interval.reads[access.stream] = access

    def _report(self, tensor: torch.Tensor, first: Access, second: Access) -> None:
        key = (first.operation, first.location, second.operation, second.location)
        if key not in self._seen:
            self._seen.add(key)
            shape = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            self.violations.append(Violation(shape, first, second))


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors with memory in a nested structure."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in leaves if tensor.layout is torch.strided and tensor.device.type != "meta"]


def _merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.element_size()
    return start, start + extent * tensor.element_size()


def _current_node() -> tuple[int, int] | None:
    """(graph task, sequence number) of the autograd node that runs; number -1 where it accumulates a leaf's
    gradient."""
    node = torch._C._current_autograd_node()
    if node is None:
        return None
    number = -1 if node.name().endswith("AccumulateGrad") else node._sequence_nr()
    return torch._C._current_graph_task_id(), number


def _location() -> str:
    """File and line of the nearest caller outside torch and this package."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "dsv3_megatron.cpu", "contextlib")):
            return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


class _Operations(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "c10d":  # recorded by the ProcessGroup methods
            self.recorder.operation(func, args, kwargs, result)
        return result


class _Engine:
    """`Variable._execution_engine`, which both torch.autograd and Megatron's schedules call."""

    def __init__(self, engine: Any, recorder: Recorder) -> None:
        self._engine, self._recorder = engine, recorder

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.run_backward(self._engine.run_backward, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _recorded_method(recorder: Recorder, name: str) -> Callable:
    method = getattr(torch.distributed.ProcessGroup, name)

    def recorded(self: Any, first: Any, *args: Any, **kwargs: Any) -> Any:
        stream = f"group {self.group_name}"
        if name in IN_PLACE:
            reads, writes = [], first
        elif name in OUTPUT_INPUT:
            reads, writes = args[0], first
        else:
            reads, writes = (first, []) if name in SEND else ([], first)
            stream += f", {name} {args[0] if args else ''}"
        return recorder.collective(stream, name, reads, writes, lambda: method(self, first, *args, **kwargs))

    return recorded


@contextmanager
def _recorded_waits(recorder: Recorder) -> Iterator[None]:
    def replacement(wait: Callable) -> Callable:
        def recorded_wait(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = recorder.in_backend(lambda: wait(self, *args, **kwargs))
            recorder.work_waited(self)
            return result

        return recorded_wait

    with ExitStack() as stack:
        for work in WORKS:
            stack.enter_context(mock.patch.object(work, "wait", replacement(work.wait)))  # type: ignore[attr-defined]
        yield


@contextmanager
def record_streams() -> Iterator[Recorder]:
    """Record stream accesses in this thread until the end of the block.

    Raises:
        RuntimeError: a record is being kept already.
    """
    if streams.recorder is not None:
        raise RuntimeError("record_streams() does not nest.")
    recorder = Recorder()
    group = torch.distributed.ProcessGroup
    methods = [n for n in IN_PLACE + OUTPUT_INPUT + SEND + RECEIVE if hasattr(group, n)]
    replaced = {name: _recorded_method(recorder, name) for name in methods}
    engine = Variable._execution_engine

    with (
        mock.patch.multiple(group, **replaced),  # type: ignore[call-overload]
        _recorded_waits(recorder),
        mock.patch.object(Variable, "_execution_engine", _Engine(engine, recorder)),
        mock.patch.object(streams, "recorder", recorder),
        _Operations(recorder),
    ):
        yield recorder
