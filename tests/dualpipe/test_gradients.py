"""Every gradient of every schedule against one process on the same batch."""

import functools

import pytest

from tests.dualpipe.common import FP64, ScheduledLayout, ScheduledProblem, reference, run_step
from tests.parallel.common import assert_same_step

OVERLAP = (("overlap_grad_reduce", True), ("use_distributed_optimizer", False))


@functools.cache
def whole(problem: ScheduledProblem):
    return reference(problem)


def check(layout: ScheduledLayout, problem: ScheduledProblem, tolerance: float = 1e-5) -> None:
    bare = ScheduledProblem(**{**vars(problem), "ddp": ()})
    assert_same_step(run_step(layout, problem), whole(bare), tolerance)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("overlap", [(), OVERLAP], ids=["", "overlap"])
@pytest.mark.parametrize("schedule, pp", [("dualpipe", 2), ("dualpipev", 2), ("zb1p", 2), ("dualpipe", 4)])
def test_fp32(schedule: str, pp: int, overlap: tuple, ep: int) -> None:
    layout = ScheduledLayout(world_size=pp * ep, pp=pp, ep=ep, schedule=schedule)
    check(layout, ScheduledProblem(num_sequences=16, ddp=overlap))


@pytest.mark.parametrize("schedule, pp, ep", [("dualpipe", 2, 2), ("dualpipev", 2, 2), ("dualpipe", 4, 1)])
def test_fp64(schedule: str, pp: int, ep: int) -> None:
    layout = ScheduledLayout(world_size=pp * ep, pp=pp, ep=ep, schedule=schedule)
    check(layout, ScheduledProblem(num_sequences=16, dtype=FP64), tolerance=1e-10)
