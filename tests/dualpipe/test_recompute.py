"""What DeepSeek-V3 recomputes (report §3.2.3) changes no gradient under any schedule."""

import functools
from unittest import mock

import pytest

from tests.dualpipe.common import FP64, ScheduledLayout, ScheduledProblem, reference, train_rank
from tests.harness import run_distributed
from tests.parallel.common import RankResult, assert_same_step, join

RECOMPUTE = (
    ("recompute_granularity", "selective"),
    ("recompute_modules", ("layernorm", "mla_up_proj")),
)


@functools.cache
def without_recompute(num_layers: int):
    return reference(ScheduledProblem(num_sequences=16, num_layers=num_layers, dtype=FP64))


def counted(
    rank: int, world_size: int, layout: ScheduledLayout, problem: ScheduledProblem
) -> tuple[RankResult, int]:
    """The rank's step, and how often something was recomputed in it."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    recompute = CheckpointWithoutOutput._recompute
    with mock.patch.object(CheckpointWithoutOutput, "_recompute", autospec=True) as counter:
        counter.side_effect = recompute
        return train_rank(rank, world_size, layout, problem), counter.call_count


@pytest.mark.parametrize(
    "schedule, ep, order",
    [
        ("zb1p", 2, "megatron"),
        pytest.param("dualpipe", 1, "megatron", marks=pytest.mark.slow),
        ("dualpipe", 2, "megatron"),
        ("dualpipev", 2, "report"),
    ],
)
def test_gradients_are_those_without_recompute(schedule: str, ep: int, order: str) -> None:
    layout = ScheduledLayout(world_size=2 * ep, pp=2, ep=ep, schedule=schedule, pair_order=order)
    problem = ScheduledProblem(num_sequences=16, dtype=FP64, overrides=RECOMPUTE)
    ranks = run_distributed(counted, layout.world_size, timeout=120, layout=layout, problem=problem)
    # At least a norm and the up-projection of every layer and microbatch that the rank sees.
    assert all(count >= 2 * 2 * problem.num_microbatches(dp=4) for _, count in ranks)
    assert_same_step(join([result for result, _ in ranks]), without_recompute(problem.num_layers), 1e-10)
