"""Every gradient of every schedule against one process on the same batch."""

import functools
import itertools

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


def _cases() -> list:
    """Every schedule with and without overlapped reduction; expert parallelism, the one with the other, by default
    where the reduction overlaps (without it: `test_fp64`)."""
    schedules = (("dualpipe", 2), ("dualpipev", 2), ("zb1p", 2), ("dualpipe", 4))
    cases = []
    for (schedule, pp), overlap, ep in itertools.product(schedules, ((), OVERLAP), (1, 2)):
        name = f"{schedule}-{pp}-{'overlap' if overlap else ''}-{ep}"
        default = (pp == 2 and bool(overlap) == (ep == 2)) or (pp == 4 and overlap and ep == 1)
        cases.append(
            pytest.param(schedule, pp, overlap, ep, id=name, marks=() if default else pytest.mark.slow)
        )
    return cases


@pytest.mark.parametrize("schedule, pp, overlap, ep", _cases())
def test_fp32(schedule: str, pp: int, overlap: tuple, ep: int) -> None:
    layout = ScheduledLayout(world_size=pp * ep, pp=pp, ep=ep, schedule=schedule)
    check(layout, ScheduledProblem(num_sequences=16, ddp=overlap))


@pytest.mark.parametrize("schedule, pp, ep", [("dualpipe", 2, 2), ("dualpipev", 2, 2), ("dualpipe", 4, 1)])
def test_fp64(schedule: str, pp: int, ep: int) -> None:
    layout = ScheduledLayout(world_size=pp * ep, pp=pp, ep=ep, schedule=schedule)
    check(layout, ScheduledProblem(num_sequences=16, dtype=FP64), tolerance=1e-10)
