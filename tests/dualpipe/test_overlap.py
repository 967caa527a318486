"""Overlapped pairs: both orders are equal to the gradient, and communication hides behind the other half."""

import functools
import time
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.dualpipe.common import FP64, ScheduledLayout, ScheduledProblem, reference, run_step
from tests.harness import run_distributed
from tests.parallel import common
from tests.parallel.common import assert_same_step

DELAY_S = 0.02


def layout(schedule: str = "dualpipe", order: str = "megatron") -> ScheduledLayout:
    return ScheduledLayout(world_size=4, pp=2, ep=2, schedule=schedule, pair_order=order)


# With MTP, the two stages have 2 and 3 layers, the four of a V 1, 1, 1 and 2.
# (test_gradients.py has the default order.)
@pytest.mark.parametrize("schedule", ["dualpipe", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_every_gradient_equals_one_process(schedule: str) -> None:
    problem = ScheduledProblem(num_sequences=16, dtype=FP64)
    assert_same_step(run_step(layout(schedule, "report"), problem), reference(problem), 1e-10)


def measured_pairs(rank: int, world_size: int, order: str, own_loop: bool, thread: bool) -> dict[str, Any]:
    """Two steps of DualPipe on chunks of three layers; the second with delays.

    Returns:
        The second step's pairs as measured nodes, and all calls of nodes in order.
    """
    from megatron.core.models.common.utils import TransformerLayerNode

    from dsv3_megatron.dualpipe import overlap
    from dsv3_megatron.dualpipe.schedule import PipelineSchedule

    problem = ScheduledProblem(num_sequences=8, num_layers=5)
    job = layout(order=order)
    job.initialize()
    config = problem.config(job)
    chunks = common.build_chunks(config, problem)
    common.prepare(chunks, problem)
    schedule = PipelineSchedule("dualpipe", 2, job.placement, 60, order)
    batch = problem.global_batch(config.vocab_size)
    if not thread:
        schedule.pairs.thread = None
    common.step(chunks, problem, batch, schedule)

    calls: list[tuple[str, str]] = []
    pairs: list[list[overlap.NodeEvent]] = []
    if own_loop:
        schedule.pairs.events = []
    all_to_all, run_pair = dist.all_to_all_single, overlap.run_pair

    def slow_all_to_all(*args: Any, **kwargs: Any) -> Any:
        time.sleep(DELAY_S)
        return all_to_all(*args, **kwargs)

    def slow_node(operation: str) -> Any:
        method = getattr(TransformerLayerNode, operation)

        def run(node: Any, *args: Any) -> Any:
            calls.append((node.name, operation))
            if node.name in ("pre_dispatch_computation", "mlp") and operation != "backward_dw":
                time.sleep(2 * DELAY_S)
            return method(node, *args)

        return run

    def one_pair(*args: Any) -> Any:
        pairs.append([])
        return run_pair(*args[:-1], pairs[-1])  # type: ignore[call-arg]

    with (
        mock.patch.object(dist, "all_to_all_single", slow_all_to_all),
        mock.patch.object(overlap, "run_pair", one_pair),
        mock.patch.multiple(
            TransformerLayerNode, **{name: slow_node(name) for name in ("forward", "backward", "backward_dw")}
        ),
    ):
        common.step(chunks, problem, batch, schedule)
    return {"calls": calls, "pairs": pairs}


@functools.cache
def measured(**kwargs: Any) -> list[dict[str, Any]]:
    return run_distributed(measured_pairs, 4, timeout=120, **kwargs)


def hidden(pairs: list[list]) -> tuple[float, float]:
    """Seconds of communication, and how many of them lie under computing nodes (which never overlap each other)."""
    total = covered = 0.0
    for pair in pairs:
        communication = [node for node in pair if node.lane == "communication"]
        computing = [node for node in pair if node.lane == "compute"]
        total += sum(node.end - node.start for node in communication)
        covered += sum(
            max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in communication for b in computing
        )
    return total, covered


@pytest.mark.parametrize("order", [pytest.param("megatron", marks=pytest.mark.slow), "report"])
def test_communication_hides_behind_the_other_half(order: str) -> None:
    """All-to-alls and computing nodes are slowed down: a pair takes less time than its nodes together."""
    for rank in measured(order=order, own_loop=True, thread=True):
        assert rank["pairs"]
        for pair in rank["pairs"]:
            wall = max(node.end for node in pair) - min(node.start for node in pair)
            assert wall < 0.85 * sum(node.end - node.start for node in pair)
        total, covered = hidden(rank["pairs"])
        assert covered > 0.5 * total


def test_nothing_hides_without_the_communication_thread() -> None:
    for rank in measured(order="report", own_loop=True, thread=False):
        total, covered = hidden(rank["pairs"])
        assert total > DELAY_S and covered == 0


def test_our_loop_calls_nodes_as_megatrons_own_does() -> None:
    """The same calls in the same order."""
    own = measured(order="megatron", own_loop=True, thread=False)
    megatrons = measured(order="megatron", own_loop=False, thread=False)
    for ours, theirs in zip(own, megatrons, strict=True):
        assert ours["pairs"] and not theirs["pairs"]
        assert ours["calls"] == theirs["calls"]


def test_layers_run_in_the_order_of_the_report() -> None:
    """combine(B), attn(F), mlp(B), dispatch(F), dispatch(B), mlp(W), mlp(F), attn(B), attn(W), combine(F)."""
    expected = [
        ("B", "moe_combine", "backward"),
        ("F", "pre_dispatch_computation", "forward"),
        ("B", "mlp", "backward"),
        ("F", "moe_dispatch", "forward"),
        ("B", "moe_dispatch", "backward"),
        ("B", "mlp", "backward_dw"),
        ("F", "mlp", "forward"),
        ("B", "pre_dispatch_computation", "backward"),
        ("B", "pre_dispatch_computation", "backward_dw"),
        ("F", "moe_combine", "forward"),
    ]
    for rank in measured(order="report", own_loop=True, thread=False):
        for pair in rank["pairs"]:
            # The second of three layers is neither dense nor MTP, in both halves.
            assert [node.step for node in pair if node.layer == 1] == expected


def test_an_unknown_order_is_refused() -> None:
    from dsv3_megatron.dualpipe.overlap import PairRunner

    with pytest.raises(ValueError, match="--pipeline-pair-order reprot: choose from megatron, report"):
        PairRunner("reprot")
