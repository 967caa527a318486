"""The record of the CPU runtime's stand-in streams: an overlapped pair waits for what it uses."""

from contextlib import nullcontext
from unittest import mock

import pytest

from dsv3_megatron.cpu import record_streams, streams
from tests.dualpipe.common import ScheduledLayout, ScheduledProblem
from tests.harness import run_distributed
from tests.parallel import common


def recorded_step(
    rank: int, world_size: int, layout: ScheduledLayout, without: str
) -> tuple[list[str], dict[str, int]]:
    """The second of two steps: its violations, and how many operations it ran on each stream.

    Args:
        without: a method of `TransformerModelChunkSchedulePlan` or of events that does nothing in this step, or "".
    """
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan

    from dsv3_megatron.dualpipe.schedule import PipelineSchedule

    problem = ScheduledProblem(num_sequences=8)
    layout.initialize()
    config = problem.config(layout)
    chunks = common.build_chunks(config, problem)
    common.prepare(chunks, problem)
    schedule = PipelineSchedule(layout.schedule, layout.pp, layout.placement, 60, layout.pair_order)
    batch = problem.global_batch(config.vocab_size)
    common.step(chunks, problem, batch, schedule)
    with record_streams() as record:
        owner = streams.Event if without == "wait" else TransformerModelChunkSchedulePlan
        with mock.patch.object(owner, without, lambda *args: None) if without else nullcontext():
            common.step(chunks, problem, batch, schedule)
    return [str(v) for v in record.violations], {str(s): n for s, n in record.num_operations.items()}


def layout(schedule: str, order: str) -> ScheduledLayout:
    return ScheduledLayout(world_size=4, pp=2, ep=2, schedule=schedule, pair_order=order)


@pytest.mark.parametrize(
    "schedule, order",
    [
        pytest.param("dualpipe", "megatron", marks=pytest.mark.slow),
        ("dualpipe", "report"),
        pytest.param("dualpipev", "report", marks=pytest.mark.slow),
    ],
)
def test_a_step_with_overlapped_pairs_has_no_missing_wait(schedule: str, order: str) -> None:
    for violations, operations in run_distributed(
        recorded_step, 4, timeout=120, layout=layout(schedule, order), without=""
    ):
        assert violations == []
        # Beside the default stream: the nodes' communication stream, the all-to-alls and the pipeline's messages.
        assert any(name.startswith("<stream") for name in operations), operations
        assert any("send" in name for name in operations), operations


@pytest.mark.parametrize("without", ["wait", "wait_current_stream"])
def test_a_missing_wait_is_seen(without: str) -> None:
    """Between the nodes of a plan, or at the end of a pair, before its output is sent."""
    for violations, _ in run_distributed(
        recorded_step, 4, timeout=120, layout=layout("dualpipe", "report"), without=without
    ):
        assert any("does not wait for" in violation for violation in violations)
