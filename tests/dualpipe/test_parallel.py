"""Tensor, sequence and context parallelism, losses per token, padding and ZeRO-1 under bidirectional schedules."""

import functools
from typing import Any

import pytest

from tests.dualpipe.common import ScheduledLayout, ScheduledProblem, reference, run_step
from tests.harness import run_distributed
from tests.parallel import test_training
from tests.parallel.common import assert_same_step, join_tensors, relative_difference

VALID = (16, 3, 7, 16, 1, 12, 16, 5, 9, 16, 2, 16, 11, 16, 8, 4)


@functools.cache
def whole(problem: ScheduledProblem):
    return reference(problem)


def check(problem: ScheduledProblem, **layout) -> None:
    got = run_step(ScheduledLayout(**layout), problem)
    assert_same_step(got, whole(ScheduledProblem(**{**vars(problem), "ddp": ()})))


@pytest.mark.parametrize(
    "sizes, schedule",
    [
        pytest.param({"tp": 2}, "dualpipe", id="tp2-dualpipe"),
        pytest.param({"cp": 2}, "dualpipe", id="cp2-dualpipe", marks=pytest.mark.slow),
        pytest.param({"tp": 2}, "dualpipev", id="tp2-dualpipev", marks=pytest.mark.slow),
        pytest.param({"cp": 2}, "dualpipev", id="cp2-dualpipev"),
    ],
)
def test_tensor_and_context_parallel(sizes: dict, schedule: str) -> None:
    """Tensor parallel with sequence parallelism."""
    check(ScheduledProblem(), world_size=4, pp=2, schedule=schedule, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2}], ids=["tp2", "cp2"])
def test_with_expert_parallel(sizes: dict) -> None:
    check(ScheduledProblem(num_sequences=16), world_size=8, pp=2, ep=2, schedule="dualpipe", **sizes)


def padded_problem(per_token_loss: bool) -> ScheduledProblem:
    """Sequences with losses on some of their tokens, and padding at the end of some."""
    padded = tuple(16 - valid if valid > 8 else 0 for valid in VALID)
    return ScheduledProblem(
        num_sequences=16, valid_tokens=VALID, padded_tokens=padded, per_token_loss=per_token_loss
    )


@pytest.mark.parametrize(
    "schedule, ep", [("dualpipe", 2), pytest.param("dualpipev", 1, marks=pytest.mark.slow)]
)
def test_per_token_loss_with_padding_and_uneven_valid_tokens(schedule: str, ep: int) -> None:
    check(padded_problem(per_token_loss=True), world_size=2 * ep, pp=2, ep=ep, schedule=schedule)


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("per_token_loss", [False, True])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
def test_padding_and_uneven_valid_tokens(schedule: str, per_token_loss: bool, ep: int) -> None:
    check(padded_problem(per_token_loss), world_size=2 * ep, pp=2, ep=ep, schedule=schedule)


ZERO1 = (("use_distributed_optimizer", True),)
OVERLAPPED = (*ZERO1, ("overlap_grad_reduce", True), ("overlap_param_gather", True))


def train(rank: int, world_size: int, layout: ScheduledLayout, problem: ScheduledProblem) -> list[Any]:
    from dsv3_megatron.dualpipe.schedule import PipelineSchedule

    schedule = PipelineSchedule(layout.schedule, layout.pp, layout.placement, 60)
    return test_training.train(rank, world_size, layout, problem, schedule)


@pytest.mark.parametrize(
    "ddp",
    [
        pytest.param(ZERO1, id="zero1", marks=pytest.mark.slow),
        pytest.param(OVERLAPPED, id="zero1_overlapped"),
    ],
)
@pytest.mark.parametrize(
    "schedule, ep", [("dualpipe", 2), pytest.param("dualpipev", 1, marks=pytest.mark.slow)]
)
def test_steps_with_zero_1(schedule: str, ep: int, ddp: tuple) -> None:
    """Three steps of Adam: losses, gradient norms and weights of one process; copies of a weight are bit-equal."""
    layout = ScheduledLayout(world_size=2 * ep, pp=2, ep=ep, schedule=schedule)
    ranks = run_distributed(
        train, layout.world_size, timeout=120, layout=layout, problem=ScheduledProblem(ddp=ddp)
    )
    expected = test_training.whole()
    for rank in ranks:
        assert [s.grad_norm for s in rank] == pytest.approx([s.grad_norm for s in expected], rel=1e-4)
    for i, step in enumerate(expected):
        reports = [report["lm loss"] for rank in ranks for report in rank[i].losses]
        assert sum(r[0] for r in reports) / sum(r[1] for r in reports) == pytest.approx(
            step.lm_loss, rel=1e-5
        )
    weights = join_tensors([rank[-1].weights for rank in ranks], "weight")
    assert weights.keys() == expected[-1].weights.keys()
    assert max(relative_difference(weights[n], w) for n, w in expected[-1].weights.items()) < 1e-3


@pytest.mark.slow
def test_eight_ranks() -> None:
    check(ScheduledProblem(num_sequences=16, num_layers=8), world_size=8, pp=8, schedule="dualpipe")
