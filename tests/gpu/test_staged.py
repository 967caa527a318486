"""The staged backend on CPU: what gloo gives, through every operation, in the order in which it was asked for."""

from typing import Any

import torch
import torch.distributed as dist

from tests.harness import run_distributed

SIZES = (3, 1)  # per destination, of an uneven all-to-all


def everything(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """Results of every operation that Megatron and the pipeline use, on `backend`."""
    from tests.gpu import staged

    staged.register()
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, 6, generator=generator)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        total = x.to(dtype)
        works = [dist.all_reduce(total, async_op=True)]
        if backend == "gloo":  # which takes no second one before the first has ended; NCCL and `staged` do
            works.pop().wait()
        works.append(dist.all_reduce(total, async_op=True))
        for work in works:
            work.wait()
        found[f"sum {dtype}"] = total
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    found["max"] = largest
    sent = x.clone()
    dist.broadcast(sent, 1)
    found["broadcast"] = sent
    found["writes seen by autograd"] = sent._version
    whole = torch.empty(world_size * 4, 6)
    dist.all_gather_into_tensor(whole, x)
    parts = [torch.empty(4, 6) for _ in range(world_size)]
    dist.all_gather(parts, x)
    found["gathered"], found["parts"] = whole, torch.cat(parts)
    part = torch.empty(4, 6)
    dist.reduce_scatter_tensor(part, whole)
    found["scattered"] = part
    splits = [SIZES[(rank + peer) % 2] for peer in range(world_size)]
    exchanged = torch.empty(sum(splits), 6)
    dist.all_to_all_single(exchanged, x[: sum(splits)].contiguous(), splits, splits)
    found["exchanged"] = exchanged
    objects: list[Any] = [None] * world_size
    dist.all_gather_object(objects, {"rank": rank})
    found["objects"] = objects
    found["messages"] = messages(rank, world_size, x)
    group = dist.new_group([0, 1])
    dist.barrier(group=group)
    with dist._coalescing_manager(group, async_ops=True) as together:  # type: ignore[attr-defined]
        outputs = [torch.empty(8, 6), torch.empty(8, 6)]
        for i, output in enumerate(outputs):
            dist.all_gather_into_tensor(output, x + i, group=group)
    together.wait()
    found["coalesced"] = torch.stack(outputs)
    return found


def messages(rank: int, world_size: int, x: torch.Tensor) -> list[torch.Tensor]:
    """Two to the next rank, whose receives are posted ahead; then both ways in one batch."""
    following, before = (rank + 1) % world_size, (rank - 1) % world_size
    ahead = [torch.empty_like(x), torch.empty_like(x)]
    receives = [dist.irecv(buffer, before) for buffer in ahead]
    sends = [dist.isend(x * factor, following) for factor in (1, 2)]
    for work in (*receives, *sends):
        work.wait()
    batch = torch.empty_like(x)
    operations = [dist.P2POp(dist.isend, x, before), dist.P2POp(dist.irecv, batch, following)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [*ahead, batch]


def test_every_operation_gives_what_gloo_gives() -> None:
    staged, gloo = (
        run_distributed(everything, world_size=2, init=False, backend=backend)
        for backend in ("staged", "gloo")
    )
    for ours, theirs in zip(staged, gloo, strict=True):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            torch.testing.assert_close(
                ours[name], expected, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert not torch.equal(staged[0]["exchanged"], staged[1]["exchanged"])


def averaged_late(rank: int, world_size: int) -> dict[str, Any]:
    from tests.gpu import staged

    staged.register()
    dist.init_process_group("staged", rank=rank, world_size=world_size)
    mean = torch.full((3,), float(rank))
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    if rank == 1:
        buffer = torch.empty(1)
        work = dist.irecv(buffer, 0)
        unfinished = work.is_completed()
        dist.barrier()  # only now does the other send
        work.wait()
        return {"mean": mean, "unfinished": unfinished, "got": buffer.item()}
    dist.barrier()
    dist.send(torch.full((1,), 7.0), 1)
    return {"mean": mean, "unfinished": False, "got": 7.0}


def test_averages_and_works_that_are_not_done_say_so() -> None:
    for found in run_distributed(averaged_late, world_size=2, init=False):
        assert found == {"mean": found["mean"], "unfinished": False, "got": 7.0}
        assert torch.equal(found["mean"], torch.full((3,), 0.5))
