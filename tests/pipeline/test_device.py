"""The model of devices by hand: streams, queues, kernels that wait for other ranks, waits of the host."""

import pytest

from dsv3_megatron.pipeline.device import Deadlock, Device, HostWait, Launch, Rendezvous, execute

ONE_QUEUE = Device(queues=1)


def launch(stream: str, *needs: int, duration: float = 1, meets: tuple = ()) -> Launch:
    return Launch(stream, needs, duration, meets, what=stream)


def test_streams_run_beside_each_other_and_their_launches_one_by_one():
    program = [launch("a"), launch("b", duration=3), launch("a"), launch("b", 2)]
    assert execute([program]) == [{0: 1, 1: 3, 2: 2, 3: 4}]


def test_a_launch_starts_when_what_it_needs_has_ended():
    assert execute([[launch("a", duration=5), launch("b", 0)]]) == [{0: 5, 1: 6}]


def test_one_queue_holds_up_other_streams_behind_a_launch_that_is_not_ready():
    program = [launch("a", duration=5), launch("b", 0), launch("c")]
    assert execute([program])[0] == {0: 5, 1: 6, 2: 1}
    assert execute([program], ONE_QUEUE)[0] == {0: 5, 1: 6, 2: 6}


def test_one_queue_runs_ready_launches_of_several_streams_beside_each_other():
    assert execute([[launch("a", duration=5), launch("b")]], ONE_QUEUE)[0] == {0: 5, 1: 1}


def test_streams_are_dealt_over_queues():
    """a and c share the first of two queues."""
    program = [launch("a", duration=5), launch("a"), launch("b"), launch("c")]
    assert execute([program], Device(queues=2))[0] == {0: 5, 1: 6, 2: 1, 3: 6}


def test_both_ends_of_a_meeting_end_together():
    early, late = (
        [launch("m", duration=2, meets=("x",))],
        [launch("c", duration=3), launch("m", 0, meets=("x",))],
    )
    late[1] = Launch("m", (0,), 2, ("x",))
    assert execute([early, late]) == [{0: 5}, {0: 3, 1: 5}]


def test_a_launch_with_two_meetings_ends_with_the_later():
    ranks = [
        [launch("m", duration=1, meets=("x", "y"))],
        [launch("m", meets=("x",))],
        [launch("c", duration=7), launch("m", 0, meets=("y",))],
    ]
    assert [max(ends.values()) for ends in execute(ranks)] == [8, 1, 8]


def test_whom_nobody_meets_waits_for_ever():
    with pytest.raises(Deadlock, match="rank 0 resident: m"):
        execute([[launch("m", meets=("x",))], [launch("m", meets=("y",)), launch("m", meets=("z",))]])


def test_waiting_kernels_fill_the_device():
    """Rank 0 has two receives in the air; what it must send first does not fit beside them."""
    ranks = [
        [launch("p", meets=("x",)), launch("q", meets=("y",)), launch("r", meets=("z",))],
        [launch("r", meets=("z",)), launch("p", 0, meets=("x",)), launch("q", 0, meets=("y",))],
    ]
    execute(ranks, Device(residents=3))
    with pytest.raises(Deadlock, match="rank 0 resident: p, q, held up: r; rank 1 resident: r"):
        execute(ranks, Device(residents=2))


def test_hosts_wait_for_each_other_at_a_rendezvous():
    ranks = [[Rendezvous("x"), launch("a")], [launch("a", duration=4), HostWait((0,)), Rendezvous("x")]]
    assert execute(ranks)[0] == {1: 5}
    crossed = [[Rendezvous("x"), Rendezvous("y")], [Rendezvous("y"), Rendezvous("x")]]
    with pytest.raises(Deadlock, match="rank 0 host at x; rank 1 host at y"):
        execute(crossed)


def test_a_wait_for_the_device_waits_for_kernels_that_wait():
    """A receive posted ahead, then a wait for the device, then what would let the other end send."""
    ahead = [[launch("m", meets=("x",)), HostWait(), launch("n", meets=("y",))]]
    other = [[launch("n", meets=("y",)), launch("m", 0, meets=("x",))]]
    with pytest.raises(Deadlock, match="rank 0 host at a wait for the device, resident: m"):
        execute(ahead + other)
    execute([[ahead[0][0], HostWait(()), ahead[0][2]], *other])


def test_a_host_wait_for_a_launch():
    assert execute([[launch("a", duration=2), HostWait((0,)), launch("b")]])[0] == {0: 2, 2: 3}
