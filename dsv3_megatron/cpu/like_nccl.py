"""Gloo made to behave as NCCL does where that can hang a job: for tests of what would only be seen on a cluster.

    cpu.behave_like_nccl()      # in every rank, at the same point of its program

- A communicator is made when it is first used, inside the call, which blocks until all its ranks have come: one per
  process group for collectives and batches, and one per pair of ranks for an isend or irecv outside of a batch.
- The operations of a communicator run one after the other, in the order in which they were issued, in the background. A
  batch (`batch_isend_irecv`) is one operation. A send ends when the receiver has come to it.
- `Work.wait()` stands for a wait on the device. The CPU computes where the host stands, so it does block, but it does
  not count. `Work.wait(timeout)`, `torch.cuda.synchronize()` and the waits of streams and events are waits of the host,
  counted in `host_waits`; `torch.cuda.synchronize()` waits for everything that any communicator has not finished.

Not modelled: hardware queues and multiprocessors (`dsv3_megatron.pipeline.nccl` has them).
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.cpu import record, streams

LIMIT_S = 300.0  # after so long whatever waits raises: on a GPU it would hang

# Of the exchanges below on a gloo group; those of batches and of pairs must not meet.
_BATCH_TAGS, _PAIR_TAGS, _FIRST_USE_TAG = (7001, 7002), (7003, 7004), 7005

_COLLECTIVES = (*record.IN_PLACE, *record.OUTPUT_INPUT, "barrier")


@dataclass(frozen=True)
class HostWait:
    """A wait of the host for its device: what for, and the nearest caller outside of torch."""

    what: str
    location: str


host_waits: list[HostWait] = []
_originals: dict[str, Callable] = {}
_limit_s = LIMIT_S


def is_installed() -> bool:
    """Whether gloo behaves like NCCL in this process."""
    return bool(_originals)


def install(limit_s: float = LIMIT_S) -> None:
    """For the rest of this process."""
    global _limit_s
    _limit_s = limit_s
    if is_installed():
        return
    group = dist.ProcessGroup
    for name in (*_COLLECTIVES, *record.SEND, *record.RECEIVE[:1]):
        if hasattr(group, name):
            _originals[name] = getattr(group, name)
            setattr(group, name, _replacement(name))
    _originals["batch_isend_irecv"] = dist.batch_isend_irecv
    dist.batch_isend_irecv = _batch
    streams.waits = _Waits()
    record.WORKS.append(Work)


@contextlib.contextmanager
def counted() -> Iterator[list[HostWait]]:
    """The waits of the host inside the block."""
    begin = len(host_waits)
    seen: list[HostWait] = []
    yield seen
    seen += host_waits[begin:]


class _Waits:
    """What streams and events of the CPU runtime tell, see `streams.Waits`."""

    def synchronize(self) -> None:
        self.host(f"torch.cuda.synchronize() with {len(_unfinished)} operations under way")
        for work in list(_unfinished):
            work.finish()

    def host(self, what: str) -> None:
        host_waits.append(HostWait(what, record._location()))


_unfinished: "dict[Work, None]" = {}


class Work:
    """An operation under way; what callers use of `torch.distributed.Work`."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._done = threading.Event()
        self._error: BaseException | None = None
        _unfinished[self] = None

    def end(self, error: BaseException | None) -> None:
        """Called by the communicator."""
        self._error = error
        _unfinished.pop(self, None)
        self._done.set()

    def finish(self, limit_s: float | None = None) -> bool:
        """Return when it is done."""
        limit_s = _limit_s if limit_s is None else limit_s
        if not self._done.wait(limit_s):
            raise RuntimeError(f"timed out after {limit_s:g} s (on NCCL it would hang): {self.what}")
        if self._error is not None:
            raise RuntimeError(f"{self.what}: {self._error}") from self._error
        return True

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not timeout:
            return self.finish()
        streams.waits.host(f"Work.wait({timeout}) of {self.what}")  # type: ignore[union-attr]
        return self.finish(timeout.total_seconds())

    def synchronize(self) -> None:
        self.finish()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def is_success(self) -> bool:
        return self._done.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error


class _Communicator:
    """Runs operations in the order in which they are issued, in a thread of its own: NCCL's stream."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Work, Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"communicator {name}", daemon=True).start()

    def submit(self, what: str, run: Callable[[], Any]) -> Work:
        work = Work(what)
        self._queue.put((work, run))
        return work

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            work, run = self._queue.get()
            error = None
            try:
                run()
            except BaseException as raised:  # raised where the work is waited for
                error = raised
            del run
            work.end(error)
            del work


_communicators: dict[tuple[str, int | None], _Communicator] = {}
_making = threading.RLock()


def _communicator(group: dist.ProcessGroup, peer: int | None) -> _Communicator:
    """Of the whole group, or of this rank and `peer` in it; made at its first use."""
    key = (group.group_name, peer)
    if key not in _communicators:
        with _making:
            if key not in _communicators:
                _come_together(group, peer)
                _communicators[key] = _Communicator(f"{group.group_name}, {'all' if peer is None else peer}")
    return _communicators[key]


def _come_together(group: dist.ProcessGroup, peer: int | None) -> None:
    limit = timedelta(seconds=_limit_s)
    ends = "all ranks" if peer is None else f"ranks {group.rank()} and {peer}"
    try:
        if peer is None:
            _originals["barrier"](group).wait(limit)
        else:
            token = torch.zeros(1, dtype=torch.uint8)
            arrived = _originals["recv"](group, [torch.zeros_like(token)], peer, _FIRST_USE_TAG)
            _originals["send"](group, [token], peer, _FIRST_USE_TAG).wait(limit)
            arrived.wait(limit)
    except RuntimeError as error:
        raise RuntimeError(
            f"first use of the communicator of {ends} of group {group.group_name}: not all came within "
            f"{_limit_s:g} s (on NCCL this hangs)"
        ) from error


def _replacement(name: str) -> Callable:
    original = _originals[name]

    def collective(self: Any, *args: Any, **kwargs: Any) -> Work:
        what = f"{name} on group {self.group_name}"
        return _communicator(self, None).submit(what, lambda: original(self, *args, **kwargs).wait())

    def send(self: Any, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> Work:
        run = lambda: _exchange(self, [(tensors[0], peer)], [], _PAIR_TAGS)  # noqa: E731
        return _communicator(self, peer).submit(f"send to {peer} on group {self.group_name}", run)

    def recv(self: Any, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> Work:
        run = lambda: _exchange(self, [], [(tensors[0], peer)], _PAIR_TAGS)  # noqa: E731
        return _communicator(self, peer).submit(f"receive from {peer} on group {self.group_name}", run)

    return {"send": send, "recv": recv}.get(name, collective)


def _batch(p2p_op_list: list[dist.P2POp]) -> list[Work]:
    """`torch.distributed.batch_isend_irecv`."""
    group = p2p_op_list[0].group or dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    sends = [(op.tensor, op.group_peer) for op in p2p_op_list if op.op is dist.isend]
    receives = [(op.tensor, op.group_peer) for op in p2p_op_list if op.op is dist.irecv]
    what = f"batch of {len(sends)} sends and {len(receives)} receives on group {group.group_name}"
    run = lambda: _exchange(group, sends, receives, _BATCH_TAGS)  # noqa: E731
    submit = lambda: _communicator(group, None).submit(what, run)  # noqa: E731
    if streams.recorder is None:
        return [submit()]
    stream, reads, writes = f"group {group.group_name}, sends and receives", *_tensors(sends, receives)
    return [streams.recorder.collective(stream, what, reads, writes, submit)]


def _tensors(*ends: list[tuple[torch.Tensor, int]]) -> list[list[torch.Tensor]]:
    return [[tensor for tensor, _ in end] for end in ends]


def _exchange(
    group: dist.ProcessGroup,
    sends: list[tuple[torch.Tensor, int]],
    receives: list[tuple[torch.Tensor, int]],
    tags: tuple[int, int],
) -> None:
    """Messages of one operation, all at once; each moves when both its ends have come to it."""
    data, ready = tags
    send, recv = _originals["send"], _originals["recv"]
    works = []
    for tensor, peer in receives:
        works.append(recv(group, [tensor], peer, data))
        works.append(send(group, [torch.zeros(1, dtype=torch.uint8)], peer, ready))
    others = [recv(group, [torch.zeros(1, dtype=torch.uint8)], peer, ready) for _, peer in sends]
    for (tensor, peer), other in zip(sends, others, strict=True):
        other.wait()
        works.append(send(group, [tensor], peer, data))
    for work in works:
        work.wait()
