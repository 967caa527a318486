"""Process groups and Megatron's parallel state on gloo."""

import torch
import torch.distributed as dist

from tests.harness import run_distributed


def stays_asynchronous(rank: int, world_size: int) -> tuple[bool, float]:
    """Rank 1 joins only after rank 0 has issued its collectives: a call that waited would never return."""
    store = dist.distributed_c10d._get_default_store()
    tensor, gathered = torch.ones(8, device="cuda"), torch.empty(16)
    if rank == 1:
        store.wait(["issued"])
    works = [
        dist.all_reduce(tensor, async_op=True),
        dist.all_gather_into_tensor(gathered, tensor, async_op=True),
    ]
    complete = any(work.is_completed() for work in works)
    store.set("issued", "")
    for work in works:
        work.wait()
    return complete, float(tensor.sum())


def test_asynchronous_collectives_do_not_wait():
    ranks = run_distributed(stays_asynchronous, world_size=2, timeout=60)
    assert ranks[0] == (False, 16.0) and ranks[1][1] == 16.0


def uneven_parts(rank: int, world_size: int) -> tuple[list[list[float]], list[float]]:
    """Gather n + 1 numbers of rank n; then sum what both ranks have for those of each."""
    mine, parts = torch.full((rank + 1, 2), float(rank)), [torch.empty(n + 1, 2) for n in range(world_size)]
    dist.all_gather(parts, mine)
    back = torch.empty_like(mine)
    dist.reduce_scatter(back, [part + 1 for part in parts])
    return [part.flatten().tolist() for part in parts], back.flatten().tolist()


def test_uneven_parts_are_gathered_and_reduced():
    gathered = [[0.0] * 2, [1.0] * 4]
    assert run_distributed(uneven_parts, world_size=2, timeout=60) == [
        (gathered, [2.0] * 2),
        (gathered, [4.0] * 4),
    ]


def nccl_becomes_gloo(rank: int, world_size: int) -> list[str]:
    options = object()  # NCCL options of any kind are dropped
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank), pg_options=options)
    groups = [dist.group.WORLD, dist.new_group([0, 1], backend="nccl", pg_options=options)]
    groups += [dist.new_group([0, 1], backend="gloo"), dist.new_group([0, 1])]
    dist.all_reduce(torch.ones(1, device="cuda"), group=groups[1])
    return [dist.get_backend(group) for group in groups]


def test_nccl_becomes_gloo():
    assert run_distributed(nccl_becomes_gloo, world_size=2, init=False) == [["gloo"] * 4] * 2


def forked_random_state(rank: int, world_size: int) -> dict[str, list]:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    saved, default = tracker.get_states(), torch.cuda.get_rng_state()
    with tracker.fork():
        first = torch.rand(2, device="cuda").tolist()
    outside = torch.rand(2, device="cuda").tolist()
    with tracker.fork():
        second = torch.rand(2, device="cuda").tolist()
    tracker.set_states(saved)
    torch.cuda.set_rng_state(default)
    with tracker.fork():
        again = [torch.rand(2, device="cuda").tolist(), torch.rand(2, device="cuda").tolist()]
    return {"first": first, "second": second, "again": again, "outside": outside}


def test_random_states_of_tensor_parallel_ranks():
    a, b = run_distributed(forked_random_state, world_size=2)
    assert a["first"] != b["first"]  # each rank its own inside the fork
    assert a["outside"] == b["outside"]  # the same outside
    for rank in (a, b):
        assert rank["again"] == [rank["first"], rank["second"]]
