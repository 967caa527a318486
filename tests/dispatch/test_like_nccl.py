"""Two hops under DualPipe on gloo that behaves as NCCL does (`cpu/like_nccl.py`): gradients, no wait of the host."""

from typing import Any
from unittest import mock

import pytest
import torch

from dsv3_megatron import cpu
from dsv3_megatron.cpu import like_nccl
from tests.dispatch.common import TWO_HOP, ScheduledTwoHopLayout
from tests.dualpipe.common import FP64, ScheduledProblem, reference, train_rank
from tests.harness import run_distributed
from tests.parallel.common import RankResult, assert_same_step, join


def counted_step(
    rank: int, world_size: int, layout: ScheduledTwoHopLayout, problem: ScheduledProblem
) -> tuple[RankResult, list[str]]:
    """A step, and the waits of the host for its device in it; reading the counts is none of the CPU runtime's."""
    from dsv3_megatron.pipeline.runner import PipelineRunner

    cpu.behave_like_nccl(60)
    waits: list[str] = []
    step = PipelineRunner.step

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with like_nccl.counted() as seen:
            events = step(self, *args, **kwargs)
        waits.extend(f"{wait.what} at {wait.location}" for wait in seen)
        torch.cuda.synchronize()
        assert like_nccl.host_waits, "waits are counted"
        return events

    with mock.patch.object(PipelineRunner, "step", counting):
        return train_rank(rank, world_size, layout, problem), waits


@pytest.mark.slow
@pytest.mark.parametrize(("ep", "node_size"), [(2, 1), (4, 2)])
def test_dualpipe(ep: int, node_size: int) -> None:
    layout = ScheduledTwoHopLayout(2 * ep, pp=2, ep=ep, node_size=node_size)
    problem = ScheduledProblem(num_sequences=16, dtype=FP64, overrides=TWO_HOP)
    ranks = run_distributed(counted_step, layout.world_size, timeout=150, layout=layout, problem=problem)
    expected = reference(ScheduledProblem(num_sequences=16, dtype=FP64))
    assert_same_step(join([result for result, _ in ranks]), expected, 1e-10)
    assert [waits for _, waits in ranks] == [[]] * layout.world_size
