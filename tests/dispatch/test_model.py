"""Steps of a whole model whose tokens go in two hops: every gradient against one process and against alltoall."""

import functools

import pytest
import torch

from tests.dispatch.common import TWO_HOP, ScheduledTwoHopLayout, TwoHopLayout
from tests.dualpipe.common import ScheduledProblem, reference
from tests.dualpipe.common import run_step as run_scheduled
from tests.parallel.common import Layout, Problem, StepResult, assert_same_step, run_step

FP64 = torch.float64
RECOMPUTED = (("recompute_granularity", "selective"), ("recompute_modules", ["moe"]))


@functools.cache
def whole(problem: Problem) -> StepResult:
    return run_step(Layout(), problem)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(torch.float32, 1e-5, marks=pytest.mark.slow), (FP64, 1e-10)]
)
def test_two_nodes_of_two(dtype, tolerance):
    ours = run_step(TwoHopLayout(4, ep=4), Problem(dtype=dtype, overrides=TWO_HOP))
    assert_same_step(ours, whole(Problem(dtype=dtype)), tolerance)
    assert_same_step(ours, run_step(Layout(4, ep=4), Problem(dtype=dtype)), tolerance)


LAYOUTS = {
    "2 × 4": TwoHopLayout(8, ep=8, node_size=4, hops=10),
    "4 × 2": TwoHopLayout(8, ep=8, node_size=2),
    "context parallel": TwoHopLayout(4, cp=2, ep=4),
    "two groups": TwoHopLayout(8, ep=4, node_size=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    ours = run_step(LAYOUTS[name], Problem(dtype=FP64, overrides=TWO_HOP))
    assert_same_step(ours, whole(Problem(dtype=FP64)), 1e-10)


@pytest.mark.slow
def test_tensor_and_sequence_parallel():
    """In fp32: the tests' cross-entropy in fp64 knows no part of a vocabulary."""
    ours = run_step(TwoHopLayout(4, tp=2, ep=4), Problem(overrides=TWO_HOP))
    assert_same_step(ours, whole(Problem()), 1e-5)


@pytest.mark.slow
def test_recompute():
    ours = run_step(TwoHopLayout(4, ep=4), Problem(dtype=FP64, overrides=(*TWO_HOP, *RECOMPUTED)))
    assert_same_step(ours, whole(Problem(dtype=FP64)), 1e-10)


SCHEDULES = [
    ("dualpipe", "megatron"),
    pytest.param("dualpipe", "report", marks=pytest.mark.slow),
    pytest.param("dualpipev", "megatron", marks=pytest.mark.slow),
    pytest.param("zb1p", "megatron", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("schedule", "order"), SCHEDULES)
def test_overlapped_pairs_of_every_schedule(schedule, order):
    layout = ScheduledTwoHopLayout(8, pp=2, ep=4, schedule=schedule, pair_order=order)
    problem = ScheduledProblem(num_sequences=16, dtype=FP64)
    ours = run_scheduled(layout, ScheduledProblem(num_sequences=16, dtype=FP64, overrides=TWO_HOP))
    assert_same_step(ours, reference(problem), 1e-10)
