"""The harness itself: values come back in order, and each way to fail is reported."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron.errors import RefusedArgument
from tests.arguments.lines import MICRO
from tests.harness import DistributedFailure, run_distributed
from tests.harness.runtime import forget_the_trainer


def total(rank: int, world_size: int, start: int) -> int:
    value = torch.tensor(start + rank)
    dist.all_reduce(value)
    return int(value)


def fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is broken")
    dist.barrier()


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)


def hang(rank: int, world_size: int) -> None:
    time.sleep(60)


def test_values_in_rank_order_and_collectives() -> None:
    assert run_distributed(total, world_size=3, start=10) == [33, 33, 33]


@pytest.mark.parametrize(
    "fn, timeout, expected",
    [(fail_on_one, 30, "rank one is broken"), (die_on_one, 30, "died without"), (hang, 1, "hung")],
)
def test_failures_are_reported(fn, timeout, expected) -> None:
    with pytest.raises(DistributedFailure, match=expected):
        run_distributed(fn, world_size=2, timeout=timeout)


def where_from(rank: int, world_size: int) -> tuple[int, bool]:
    return os.getppid(), "megatron.training" in sys.modules


def test_all_ranks_come_from_one_process_that_has_imported_megatron() -> None:
    first = run_distributed(where_from, world_size=2)
    second = run_distributed(where_from, world_size=2)
    assert first == second
    assert all(imported for _, imported in first)


def start_a_child(rank: int, world_size: int) -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def test_what_a_rank_starts_ends_with_it() -> None:
    for pid in run_distributed(start_a_child, world_size=2, init=False):
        with pytest.raises(ProcessLookupError):
            for _ in range(50):  # killed, and reaped soon after
                os.kill(pid, 0)
                time.sleep(0.1)


def test_a_start_that_was_refused_is_forgotten() -> None:
    """A folder is looked at after Megatron has set its arguments: the second start must not hear of the first."""
    from megatron.training import global_vars

    from dsv3_megatron import train

    words = ["--spec", "dsv3", "--device", "cpu", *MICRO, "--save", "/proc/nowhere", "--save-interval", "1"]
    for _ in range(2):
        with pytest.raises(RefusedArgument, match="/proc/nowhere"):
            train.main(words)
        assert global_vars._GLOBAL_ARGS is not None
        forget_the_trainer()
        assert global_vars._GLOBAL_ARGS is None
