"""What a rank issues: complete, in order, and for NCCL in one order at both ends of every message."""

import dataclasses
import itertools
from typing import Any

import pytest

from dsv3_megatron.pipeline import (
    SCHEDULES,
    Action,
    Kind,
    Message,
    Operation,
    Schedule,
    build_schedule,
    host_operations,
    simulate,
)
from dsv3_megatron.pipeline.comms import channel_orders, receives, sends
from dsv3_megatron.pipeline.operations import BACKENDS

SIZES = ((2, 8), (4, 8), (4, 12), (8, 16))


def tables() -> list[Schedule]:
    built = [build_schedule(name, *size) for name in SCHEDULES for size in SIZES]
    return [*built, *(table.forward_only() for table in built)]


def issued(schedule: Schedule, backend: Any) -> list[list[Operation]]:
    return [host_operations(schedule, rank, backend) for rank in range(schedule.num_ranks)]


def check_rank(schedule: Schedule, rank: int, operations: list[Operation]) -> None:
    """Each action once, in the table's order; sends behind what makes them, waits behind posts and right before use."""
    assert [o.action for o in operations if o.kind == "compute"] == list(schedule.ranks[rank])
    made: set[Message] = set()
    posted: list[Message] = []
    sent: list[Message] = []
    waited: set[Message] = set()
    for before, operation in itertools.pairwise([Operation("compute"), *operations]):
        if operation.action is not None:
            needed = set(receives(schedule, operation.action))
            assert needed <= waited
            assert (set(before.receives) if before.kind == "wait" else set()) == needed
            made.update(sends(schedule, operation.action))
            continue
        if operation.kind == "wait":
            assert not operation.sends and operation.receives
            assert set(operation.receives) <= set(posted) - waited
            waited.update(operation.receives)
            continue
        assert set(operation.sends) <= made
        assert all(message.channel.source == rank for message in operation.sends)
        assert all(message.channel.destination == rank for message in operation.receives)
        posted += operation.receives
        sent += operation.sends
    assert len(set(posted)) == len(posted) and len(set(sent)) == len(sent)
    assert waited == set(posted)
    for messages, role in ((sent, "source"), (posted, "destination")):
        expected = {
            message
            for channel, order in channel_orders(schedule).items()
            if getattr(channel, role) == rank
            for message in order.sent
        }
        assert set(messages) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_are_complete_and_in_order(backend):
    for schedule in tables():
        for rank, operations in enumerate(issued(schedule, backend)):
            check_rank(schedule, rank, operations)


def test_the_check_sees_a_moved_or_a_missing_operation():
    schedule = build_schedule("dualpipe", 4, 8)
    operations = host_operations(schedule, 1)
    place = next(i for i, o in enumerate(operations) if o.kind == "batch" and o.sends)
    moved = [operations[place], *operations[:place], *operations[place + 1 :]]
    for broken in (moved, operations[:place] + operations[place + 1 :]):
        with pytest.raises(AssertionError):
            check_rank(schedule, 1, broken)


def test_nccl_posts_batches_and_both_ends_of_every_pair_of_ranks_have_one_order():
    """NCCL matches the messages between two ranks by their order alone, whatever their payload."""
    for schedule in tables():
        lists = issued(schedule, "nccl")
        assert {o.kind for operations in lists for o in operations} <= {"batch", "wait", "compute"}
        for a, b in itertools.permutations(range(schedule.num_ranks), 2):
            sent = [m for o in lists[a] for m in o.sends if m.channel.destination == b]
            received = [m for o in lists[b] if o.kind == "batch" for m in o.receives if m.channel.source == a]
            assert sent == received


def test_gloo_keeps_receives_posted_ahead_and_sends_at_once():
    schedule = build_schedule("dualpipe", 4, 16)
    for ahead, rank in itertools.product((1, 2, 3), range(4)):
        operations = host_operations(schedule, rank, "gloo", receives_ahead=ahead)
        assert {o.kind for o in operations} == {"isend", "irecv", "wait", "compute"}
        check_rank(schedule, rank, operations)
        under_way: dict = {}
        for place, operation in enumerate(operations):
            for message in operation.receives:
                change = 1 if operation.kind == "irecv" else -1
                under_way[message.channel] = under_way.get(message.channel, 0) + change
                assert under_way[message.channel] <= ahead + 1
            if operation.kind == "compute":
                behind = operations[place + 1 : place + 1 + len(sends(schedule, operation.action))]
                assert [m for o in behind for m in o.sends] == sends(schedule, operation.action)
                left = {
                    channel: sum(channel == m.channel for o in operations[place:] for m in o.receives) // 2
                    for channel in under_way
                }
                # While it computes, so many are posted, or all that are left.
                assert all(
                    count == ahead or count >= min(ahead, left[channel])
                    for channel, count in under_way.items()
                )


def test_one_rank_only_computes():
    schedule = build_schedule("dualpipev", 1, 4)
    for backend in BACKENDS:
        operations = host_operations(schedule, 0, backend)
        assert [o.action for o in operations] == list(schedule.ranks[0])


def test_what_is_in_a_batch_is_made_and_used_at_the_same_moments():
    """A batch ends with its last message: an urgent one does not wait for one that has time."""
    for schedule in (build_schedule(name, 4, 16) for name in SCHEDULES):
        events = simulate(schedule).events
        made = {message: event.end for event in events for message in sends(schedule, event.action)}
        used = {message: event.start for event in events for message in receives(schedule, event.action)}
        for operation in itertools.chain(*issued(schedule, "nccl")):
            if operation.kind == "batch":
                moments = {(made[m], used[m]) for m in (*operation.sends, *operation.receives)}
                assert len(moments) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2}, "rank=2: the schedule's ranks are 0 to 1"),
        ({"rank": -1}, "rank=-1: the schedule's ranks are 0 to 1"),
        ({"backend": "mpi"}, "backend='mpi': use one of nccl, gloo"),
        ({"backend": "gloo", "receives_ahead": 0}, "receives_ahead=0: at least 1 receive must be posted"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        host_operations(build_schedule("1f1b", 2, 4), **({"rank": 0} | options))


def test_a_table_that_cannot_finish_is_refused():
    schedule = build_schedule("1f1b", 2, 2)
    f0, f1, b0, b1 = (Action(kind, 0, 0, m) for kind in (Kind.F, Kind.B) for m in (0, 1))
    broken = dataclasses.replace(schedule, ranks=((f0, b0, f1, b1), (*reversed(schedule.ranks[1]),)))
    with pytest.raises(ValueError, match="cannot finish"):
        host_operations(broken, 0)


def test_operations_say_what_they_are():
    operations = host_operations(build_schedule("1f1b", 2, 1), 1)
    assert [str(o) for o in operations[:3]] == [
        "batch (receive activation for stage 1, direction 0, microbatch 0 (rank 0 to rank 1))",
        "wait (receive activation for stage 1, direction 0, microbatch 0 (rank 0 to rank 1))",
        "compute F0@1",
    ]
