"""Gloo that behaves like NCCL: right results, and the hangs and waits that gloo does not have."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron import cpu
from dsv3_megatron.cpu import like_nccl
from tests.harness import run_distributed


def collectives(rank: int, world_size: int) -> None:
    cpu.behave_like_nccl()
    group = dist.new_group([0, 1])
    mine = torch.full((2,), float(rank + 1))
    for g in (None, group):
        total = mine.clone()
        assert dist.all_reduce(total, group=g) is None
        assert total.tolist() == [3, 3]
    work = dist.all_reduce(total, async_op=True)
    work.wait()
    assert total.tolist() == [6, 6] and work.is_completed()
    gathered = torch.empty(4)
    dist.all_gather_into_tensor(gathered, mine)
    assert gathered.tolist() == [1, 1, 2, 2]
    part = torch.empty(1)
    dist.reduce_scatter_tensor(part, mine.clone())
    assert part.tolist() == [3]
    swapped = torch.empty(2)
    dist.all_to_all_single(swapped, torch.tensor([10.0 * rank, 10.0 * rank + 1]))
    assert swapped.tolist() == [float(rank), 10.0 + rank]
    box: list[Any] = [rank]
    dist.broadcast_object_list(box, src=1)
    assert box == [1]
    dist.barrier()


def test_collectives_give_gloos_results() -> None:
    run_distributed(collectives, 2, timeout=60)


def messages(rank: int, world_size: int) -> None:
    cpu.behave_like_nccl()
    other = 1 - rank
    first, second = torch.full((3,), 10.0 + rank), torch.full((4, 2), 20.0 + rank)
    got = [torch.empty(3), torch.empty(4, 2)]
    posts = [dist.P2POp(dist.isend, tensor, other) for tensor in (first, second)]
    posts += [dist.P2POp(dist.irecv, tensor, other) for tensor in got]
    (work,) = dist.batch_isend_irecv(posts)
    work.wait()
    assert [t.unique().tolist() for t in got] == [[10.0 + other], [20.0 + other]]
    if rank == 0:
        dist.send(first, 1)
        dist.recv(got[0], 1)
    else:
        dist.recv(got[0], 0)
        dist.send(first, 0)
    assert got[0].unique().tolist() == [10.0 + other]


def test_messages_alone_and_in_batches() -> None:
    run_distributed(messages, 2, timeout=60)


def crossing(rank: int, world_size: int, batched: bool) -> str:
    """Each rank first receives on a group on which the other first sends something else."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    cpu.behave_like_nccl(limit_s=2)
    if rank == 1:
        groups.reverse()
    buffers = [torch.empty(1), torch.empty(1)]
    try:
        if batched:
            group = dist.group.WORLD
            posts = [dist.P2POp(dist.irecv, b, 1 - rank, group) for b in buffers]
            posts += [dist.P2POp(dist.isend, torch.ones(1), 1 - rank, group) for _ in buffers]
            for work in dist.batch_isend_irecv(posts):
                work.wait()
        else:
            works = [dist.irecv(b, 1 - rank, group=group) for b, group in zip(buffers, groups, strict=True)]
            works += [dist.isend(torch.ones(1), 1 - rank, group=group) for group in groups]
            for work in works:
                work.wait()
    except RuntimeError as error:
        return str(error)
    return "done"


def test_receives_posted_ahead_hang_in_the_making_of_communicators() -> None:
    for answer in run_distributed(crossing, 2, timeout=60, batched=False):
        assert answer.startswith("first use of the communicator of ranks ") and "on NCCL this hangs" in answer
    assert run_distributed(crossing, 2, timeout=60, batched=True) == ["done", "done"]


def in_order(rank: int, world_size: int) -> list[bool]:
    """Rank 0 sends twice; rank 1 takes the messages after a while each."""
    cpu.behave_like_nccl()
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.zeros(1), group=group)
    if rank == 0:
        works = [
            *dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.ones(1), 1, group)]),
            *dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.ones(1), 1, group)]),
        ]
        seen = [any(work.is_completed() for work in works)]
        works[0].wait()
        seen.append(works[1].is_completed())
        works[1].wait()
        return seen
    for _ in range(2):
        time.sleep(0.3)
        (work,) = dist.batch_isend_irecv([dist.P2POp(dist.irecv, torch.empty(1), 0, group)])
        work.wait()
    return []


def test_operations_of_a_communicator_run_in_order_and_sends_end_when_they_are_taken() -> None:
    assert run_distributed(in_order, 2, timeout=60)[0] == [False, False]


def waits(rank: int, world_size: int) -> tuple[list[str], str]:
    cpu.behave_like_nccl(limit_s=1)
    other, group = 1 - rank, dist.new_group([0, 1])
    dist.all_reduce(torch.zeros(1), group=group)

    def post(operation: Any) -> Any:
        return dist.batch_isend_irecv([dist.P2POp(operation, torch.ones(1), other, group)])[0]

    with like_nccl.counted() as seen:
        work = post(dist.irecv) if rank == 0 else post(dist.isend)
        work.wait()  # on the device
        torch.cuda.synchronize()
        torch.cuda.current_stream().synchronize()
        work = post(dist.irecv) if rank == 0 else post(dist.isend)
        work.wait(timedelta(seconds=5))
    assert all(f"{__name__}:" in wait.location for wait in seen), seen
    if rank == 0:
        post(dist.irecv)  # nobody sends
        with pytest.raises(RuntimeError) as error:
            torch.cuda.synchronize()
        return [wait.what for wait in seen], str(error.value)
    return [wait.what for wait in seen], ""


def test_waits_of_the_host_are_counted_and_a_wait_for_the_device_waits_for_receives() -> None:
    (seen, error), _ = run_distributed(waits, 2, timeout=60)
    assert [what.split(" of ")[0] for what in seen] == [
        "torch.cuda.synchronize() with 0 operations under way",
        "a wait for an event or a stream",
        "Work.wait(0:00:05)",
    ]
    assert error.startswith("timed out after 1 s (on NCCL it would hang): batch of 0 sends and 1 receives")


def failing(rank: int, world_size: int) -> str:
    cpu.behave_like_nccl(limit_s=5)
    with pytest.raises(RuntimeError) as error:
        dist.all_to_all_single(torch.empty(3), torch.empty(3))  # 3 elements for 2 ranks
    return str(error.value)


def test_an_error_in_the_background_is_raised_where_it_is_waited_for() -> None:
    for message in run_distributed(failing, 2, timeout=60):
        assert "on group 0" in message


def test_it_needs_the_cpu_runtime(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "_active", False)
    with pytest.raises(RuntimeError, match="needs dsv3_megatron"):
        cpu.behave_like_nccl()
    assert not cpu.is_like_nccl()
