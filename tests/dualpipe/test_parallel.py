"""Tensor, sequence and context parallelism, losses per token, padding and ZeRO-1 under bidirectional schedules."""

import functools

import pytest

from tests.dualpipe.common import ScheduledLayout, ScheduledProblem, reference, run_step
from tests.parallel.common import assert_same_step

VALID = (16, 3, 7, 16, 1, 12, 16, 5, 9, 16, 2, 16, 11, 16, 8, 4)


@functools.cache
def whole(problem: ScheduledProblem):
    return reference(problem)


def check(problem: ScheduledProblem, **layout) -> None:
    got = run_step(ScheduledLayout(**layout), problem)
    assert_same_step(got, whole(ScheduledProblem(**{**vars(problem), "ddp": ()})))


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2}], ids=["tp2", "cp2"])
def test_tensor_and_context_parallel(sizes: dict, schedule: str) -> None:
    """Tensor parallel with sequence parallelism."""
    check(ScheduledProblem(), world_size=4, pp=2, schedule=schedule, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2}], ids=["tp2", "cp2"])
def test_with_expert_parallel(sizes: dict) -> None:
    check(ScheduledProblem(num_sequences=16), world_size=8, pp=2, ep=2, schedule="dualpipe", **sizes)


@pytest.mark.parametrize("schedule, ep", [("dualpipe", 2), ("dualpipev", 1)])
def test_per_token_loss_with_uneven_valid_tokens(schedule: str, ep: int) -> None:
    problem = ScheduledProblem(num_sequences=16, valid_tokens=VALID, per_token_loss=True)
    check(problem, world_size=2 * ep, pp=2, ep=ep, schedule=schedule)


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("per_token_loss", [False, True])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
def test_padding_and_uneven_valid_tokens(schedule: str, per_token_loss: bool, ep: int) -> None:
    padded = tuple(16 - valid if valid > 8 else 0 for valid in VALID)
    problem = ScheduledProblem(
        num_sequences=16, valid_tokens=VALID, padded_tokens=padded, per_token_loss=per_token_loss
    )
    check(problem, world_size=2 * ep, pp=2, ep=ep, schedule=schedule)


@pytest.mark.slow
def test_eight_ranks() -> None:
    check(ScheduledProblem(num_sequences=16, num_layers=8), world_size=8, pp=8, schedule="dualpipe")
