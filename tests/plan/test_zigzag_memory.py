"""The memory of weight gradients that wait: live tensors of real steps against the cap of their table."""

import dataclasses

import pytest

from dsv3_megatron.pipeline import Budget
from dsv3_megatron.plan.activations import footprint
from dsv3_megatron.plan.memory import RankMemory, plan_memory
from dsv3_megatron.plan.step import schedule_of
from tests.dualpipe.common import ScheduledLayout
from tests.plan import measure
from tests.plan.test_memory import BOUND, _job, _model, _problem

# Weight gradients take as long as in no model, so that as many as may will wait.
EAGER = (("deferred", 0.0), ("memory_cap", 1e6))


def planned(layout: ScheduledLayout) -> tuple[RankMemory, ...]:
    job = _job(layout, _problem(recompute=False))
    return plan_memory(job, _model()[0], schedule_of(job))


def microbatches(rank: RankMemory) -> float:
    """Bytes of activations and of weight gradients that wait, at the rank's peak."""
    return rank.parts["activations"] + rank.parts["deferred weight gradients"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pp, chunks",
    [(2, 2), (4, 2), (2, 4)],
)
def test_live_tensors_keep_to_the_cap(pp: int, chunks: int) -> None:
    """A cap in bytes, with each stage's own activations and weight gradients: every rank is within 3% of what the
    planner says of the table, and no rank passes the cap; without a cap the same ranks do."""
    layout = ScheduledLayout(world_size=pp, pp=pp, schedule="zigzag", chunks=chunks, table=EAGER)
    job = _job(layout, _problem(recompute=False))
    sizes = [footprint(job, stage) for stage in job.stages]
    kept, deferred = tuple(s.kept for s in sizes), tuple(s.deferred for s in sizes)
    free = schedule_of(job)
    cap = 1.05 * max(Budget(0, 0.0, kept).peaks(free.ranks, free.num_stages))
    capped = dataclasses.replace(layout, table=(("kept", kept), ("deferred", deferred), ("memory_cap", cap)))
    passed = {}
    for one in (capped, layout):
        measured = measure.run(one, _problem(recompute=False), timeout=400)
        plans = planned(one)
        errors = [rank.peak / peak - 1 for rank, peak in zip(plans, measured, strict=True)]
        # What is not of microbatches is known; the rest of what was measured is.
        held = [peak - rank.peak + microbatches(rank) for rank, peak in zip(plans, measured, strict=True)]
        print(
            one.table[-1], [f"{error:+.2%}" for error in errors], [f"{h / cap:.3f} of the cap" for h in held]
        )
        assert max(map(abs, errors)) <= BOUND
        passed[one] = max(held) / cap
    assert passed[capped] <= 1 + BOUND
    assert passed[layout] > 1 + BOUND  # the same check fails without the cap: that is what kept them
