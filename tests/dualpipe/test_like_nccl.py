"""DualPipe with messages as on NCCL: the gradients, no wait of the host in a step, profiles and timers that end.

`make test-nccl` runs all of tests/dualpipe so.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dsv3_megatron import cpu
from dsv3_megatron.cpu import like_nccl
from dsv3_megatron.pipeline import Kind, build_schedule
from dsv3_megatron.pipeline.comms import receives, sends
from dsv3_megatron.pipeline.trace import read_trace
from tests.arguments.lines import MICRO
from tests.dualpipe.common import FP64, ScheduledLayout, ScheduledProblem, reference, train_rank
from tests.dualpipe.test_profile import check_timeline
from tests.harness import DistributedFailure, run_distributed
from tests.parallel import test_resume
from tests.parallel.common import RankResult, assert_same_step, join

DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
CARRIERS = ("dsv3_megatron.dualpipe.p2p.pipeline.carrier", "dsv3_megatron.dualpipe.schedule.carrier")


def behave(limit_s: float = 60, ahead: bool = False, made_before: bool = False) -> None:
    """Messages as on NCCL; with `ahead` in gloo's form, whose communicators are `made_before` or when first used."""
    cpu.behave_like_nccl(limit_s)
    if ahead:
        for name in CARRIERS:
            mock.patch(name, lambda: "gloo").start()
    if made_before:
        mock.patch.object(like_nccl, "_come_together", lambda *_: None).start()


def counted_step(
    rank: int, world_size: int, layout: ScheduledLayout, problem: ScheduledProblem, **how: Any
) -> tuple[RankResult, list[str]]:
    """A training step, and the waits of the host inside the runner's that are not Megatron's own.

    (Its dispatcher needs the number of tokens of each expert on the host, for which it waits for the router's stream.)
    """
    from dsv3_megatron.pipeline.runner import PipelineRunner

    behave(**how)
    waits: list[str] = []
    step = PipelineRunner.step

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with like_nccl.counted() as seen:
            events = step(self, *args, **kwargs)
        assert seen, "the dispatcher's are seen"
        ours = [wait for wait in seen if DISPATCHER not in wait.location]
        waits.extend(f"{wait.what} at {wait.location}" for wait in ours)
        return events

    with mock.patch.object(PipelineRunner, "step", counting):
        return train_rank(rank, world_size, layout, problem), waits


@functools.cache
def whole(dtype: Any):
    return reference(ScheduledProblem(num_sequences=16, dtype=dtype))


def check(layout: ScheduledLayout, problem: ScheduledProblem, tolerance: float) -> None:
    ranks = run_distributed(counted_step, layout.world_size, timeout=150, layout=layout, problem=problem)
    assert_same_step(join([result for result, _ in ranks]), whole(problem.dtype), tolerance)
    assert [waits for _, waits in ranks] == [[]] * layout.world_size


@pytest.mark.parametrize(
    "schedule, pp, ep",
    [
        ("dualpipe", 2, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *(("dualpipev", 2, 1), ("zb1p", 2, 1), ("dualpipe", 4, 1)),
                *(("zigzag", 2, 1), ("zigzag", 4, 1)),
            )
        ),
    ],
)
def test_gradients_without_a_wait_of_the_host(schedule: str, pp: int, ep: int) -> None:
    layout = ScheduledLayout(world_size=pp * ep, pp=pp, ep=ep, schedule=schedule)
    sizes: dict[str, Any] = {"layers": (1, 1, 1, 1, 0, 0, 0, 0)} if (schedule, pp) == ("zigzag", 4) else {}
    check(layout, ScheduledProblem(num_sequences=16, dtype=FP64, **sizes), 1e-10)


OVERLAP = (("overlap_grad_reduce", True), ("use_distributed_optimizer", False))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["megatron", "report"])
@pytest.mark.parametrize(
    "schedule, pp", [("dualpipe", 2), ("dualpipev", 2), ("zb1p", 2), ("dualpipe", 4), ("zigzag", 2)]
)
def test_gradients_with_expert_parallelism_and_overlapped_reduction(
    schedule: str, pp: int, order: str
) -> None:
    layout = ScheduledLayout(world_size=2 * pp, pp=pp, ep=2, schedule=schedule, pair_order=order)
    check(layout, ScheduledProblem(num_sequences=16, dtype=FP64, ddp=OVERLAP), 1e-10)


PROBLEM = ScheduledProblem(num_sequences=8)


def test_receives_posted_ahead_make_the_host_wait() -> None:
    """The form before, with its communicators there: it ends, and the host waits for each message."""
    layout = ScheduledLayout(world_size=2, pp=2, schedule="dualpipe")
    ranks = run_distributed(
        counted_step, 2, timeout=90, layout=layout, problem=PROBLEM, ahead=True, made_before=True
    )
    for _, waits in ranks:
        received = [wait for wait in waits if wait.startswith("Work.wait(0:01:00) of receive from ")]
        # Each of the 8 sequences passes the border twice, once on its way to this rank.
        assert len(received) == PROBLEM.num_sequences
        assert all("dualpipe.p2p.gloo:" in wait for wait in waits)
        assert all("of send to " in wait for wait in waits if wait not in received)  # the thread's


def test_receives_posted_ahead_hang_where_communicators_are_made_at_first_use() -> None:
    layout = ScheduledLayout(world_size=2, pp=2, schedule="dualpipe")
    with pytest.raises(DistributedFailure, match="first use of the communicator of ranks"):
        run_distributed(counted_step, 2, timeout=60, layout=layout, problem=PROBLEM, ahead=True, limit_s=2)


# --- the trainer


def train(rank: int, world_size: int, words: list[str], **how: Any) -> Any:
    behave(**how)
    return test_resume.train(rank, world_size, words)


@dataclasses.dataclass(frozen=True)
class Job:
    schedule: str
    ep: int

    def run(self, folder: Path, **how: Any) -> None:
        """Three iterations; the second is profiled, and timers wait for the device within all."""
        words = ["--spec", "dsv3", "--device", "cpu", *MICRO, "--pipeline-schedule", self.schedule]
        words += ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", str(self.ep)]
        words += ["--profile-pipeline", "2", "--profile-pipeline-dir", str(folder)]
        words += ["--timing-log-level", "2", "--log-interval", "1"]
        run_distributed(train, 2 * self.ep, timeout=90, init=False, log_dir=folder, words=words, **how)


@pytest.mark.parametrize(
    "job",
    [
        Job("dualpipe", 1),
        *(pytest.param(job, marks=pytest.mark.slow) for job in (Job("dualpipe", 2), Job("zb1p", 1))),
    ],
    ids=str,
)
def test_a_profile_and_timers_that_wait_for_the_device_end(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path)
    timelines = read_trace(tmp_path / "pipeline_step2.json")
    table = build_schedule(job.schedule, 2, 8 // job.ep)
    for timeline in timelines.values():
        check_timeline(timeline, table)
    assert "forward-compute" in (tmp_path / f"rank{2 * job.ep - 1}.log").read_text()


@pytest.mark.slow
def test_with_receives_posted_ahead_such_timers_hang(tmp_path: Path) -> None:
    """Though the communicators are there: the timer waits for receives that what it measures must lead to."""
    with pytest.raises(DistributedFailure, match="timed out after 3 s"):
        Job("dualpipe", 1).run(tmp_path, ahead=True, made_before=True, limit_s=3)


# --- a pair


def order_of_plans_and_waits(rank: int, world_size: int, layout: ScheduledLayout) -> list[list[str]]:
    """What each overlapped pair does, in order: its plan, its waits, its sends."""
    from dsv3_megatron.dualpipe.chunk import ChunkStage
    from dsv3_megatron.dualpipe.overlap import PairRunner
    from dsv3_megatron.dualpipe.p2p import PipelineP2P

    behave()
    pairs: list[list[str]] = []
    inside: list[bool] = []
    call, plan, wait, send = PairRunner.__call__, ChunkStage.plan, PipelineP2P.wait, PipelineP2P.send

    def note(what: str) -> None:
        if inside:
            pairs[-1].append(what)

    def noted(what: str, method: Any) -> Any:
        def noting(*args: Any) -> Any:
            note(what)
            return method(*args)

        return noting

    def pair(*args: Any) -> None:
        pairs.append([])
        inside.append(True)
        call(*args)
        inside.pop()

    with (
        mock.patch.object(PairRunner, "__call__", pair),
        mock.patch.object(ChunkStage, "plan", noted("plan", plan)),
        mock.patch.object(PipelineP2P, "wait", noted("wait", wait)),
        mock.patch.object(PipelineP2P, "send", noted("send", send)),
    ):
        train_rank(rank, world_size, layout, ScheduledProblem(num_sequences=16))
    return pairs


def test_the_plan_of_a_pair_is_built_while_its_messages_are_under_way() -> None:
    """First the plan, then one wait for all that the pair receives, where it receives something."""
    layout = ScheduledLayout(world_size=4, pp=2, ep=2, schedule="dualpipe")
    table = build_schedule("dualpipe", 2, 8)
    assert layout.placement is not None
    ranks = run_distributed(order_of_plans_and_waits, 4, timeout=120, layout=layout)
    for rank, done in enumerate(ranks):
        pipeline_rank = layout.placement.pipeline_rank(rank, 4)
        pairs = [action for action in table.ranks[pipeline_rank] if action.kind is Kind.PAIR]
        assert any(receives(table, pair) for pair in pairs)
        assert done == [
            ["plan", *(["wait"] if receives(table, pair) else []), *["send"] * len(sends(table, pair))]
            for pair in pairs
        ]
