"""A record of process groups and of what a rank issues on each: whether the ranks of a large job would agree.

    with record_communicators() as record:
        ...
    record.groups, record.issued

One process can stand for one rank of any job, with torch's fake backend. Records of several ranks are then compared:
the same groups under the same names, and the same operations on each, in one order at all its ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist

from dsv3_megatron.cpu.record import IN_PLACE, OUTPUT_INPUT


@dataclass(frozen=True)
class Group:
    """A call of `new_group`: the ranks as given, and the name where this rank is a member (else None)."""

    ranks: tuple[int, ...]
    name: str | None


@dataclass(frozen=True)
class Issued:
    """An operation on a group.

    Attributes:
        group: its name.
        kind: the collective's name in `ProcessGroup`, or "batch".
        sends, receives: of a batch, the global ranks at the other ends, in order.
    """

    group: str
    kind: str
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()


@dataclass(frozen=True)
class Waited:
    """What follows waits for `issued[place]`."""

    place: int


@dataclass
class Record:
    """What `record_communicators()` yields: groups in the order of their making, operations and waits as issued."""

    groups: list[Group] = field(default_factory=list)
    issued: list[Issued | Waited] = field(default_factory=list)
    members: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the groups that were used

    def add(self, group: dist.ProcessGroup, kind: str, *ends: tuple[int, ...]) -> int:
        self.members[group.group_name] = tuple(dist.get_process_group_ranks(group))
        self.issued.append(Issued(group.group_name, kind, *ends))
        return len(self.issued) - 1


class _Work:
    """A work whose waits are recorded."""

    def __init__(self, work: Any, record: Record, place: int) -> None:
        self._work, self._record, self._place = work, record, place

    def wait(self, *limit: Any) -> bool:
        self._record.issued.append(Waited(self._place))
        return self._work.wait(*limit)

    def is_completed(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def record_communicators() -> Iterator[Record]:
    """Record groups and operations of this process until the end of the block.

    Raises:
        RuntimeError: from a send or receive outside of a batch.
    """
    record = Record()
    group_class, new_group, batch = dist.ProcessGroup, dist.new_group, dist.batch_isend_irecv
    sends_and_receives = {name: getattr(group_class, name) for name in ("send", "recv")}
    in_batch: list[Any] = []

    def recorded_new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        group = new_group(ranks, *args, **kwargs)
        members = tuple(range(dist.get_world_size()) if ranks is None else ranks)
        is_member = isinstance(group, group_class)
        record.groups.append(Group(members, group.group_name if is_member else None))
        return group

    def collective(name: str, method: Callable) -> Callable:
        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            place = record.add(self, name)
            work = method(self, *args, **kwargs)
            return work if work is None else _Work(work, record, place)

        return recorded

    def single(method: Callable) -> Callable:
        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not in_batch:
                raise RuntimeError(
                    "an isend or irecv outside of a batch: on NCCL it makes a communicator of its own"
                )
            return method(self, *args, **kwargs)

        return recorded

    def recorded_batch(ops: list[dist.P2POp]) -> list[Any]:
        group = ops[0].group or dist.group.WORLD
        assert isinstance(group, group_class)
        sends = tuple(op.peer for op in ops if op.op is dist.isend)
        receives = tuple(op.peer for op in ops if op.op is dist.irecv)
        place = record.add(group, "batch", sends, receives)
        in_batch.append(ops)
        try:
            return [_Work(work, record, place) for work in batch(ops)[:1]]
        finally:
            in_batch.pop()

    methods = {
        name: collective(name, getattr(group_class, name))
        for name in (*IN_PLACE, *OUTPUT_INPUT, "barrier")
        if hasattr(group_class, name)
    }
    methods |= {name: single(method) for name, method in sends_and_receives.items()}
    with (
        mock.patch.multiple(group_class, **methods),  # type: ignore[call-overload]
        mock.patch.object(dist, "new_group", recorded_new_group),
        mock.patch.object(dist, "batch_isend_irecv", recorded_batch),
    ):
        yield record
