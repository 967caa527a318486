"""The runner over gloo: the gradients of every schedule are those of one process."""

import time

import pytest
import torch

from dsv3_megatron import cpu
from dsv3_megatron.dualpipe.p2p import PipelineP2P
from dsv3_megatron.pipeline import Action, Kind, build_schedule
from dsv3_megatron.pipeline.runner import PipelineRunner, _program
from tests.harness import DistributedFailure, run_distributed
from tests.pipeline import toy

NAMES = {
    1: [("dualpipev", 3), ("1f1b", 2)],
    2: [("1f1b", 5), ("zb1p", 5), ("dualpipe", 6), ("dualpipev", 5), ("interleaved_1f1b_overlap", 6)],
    4: [("1f1b", 6), ("zb1p", 6), ("dualpipe", 10), ("dualpipev", 9), ("interleaved_1f1b_overlap", 8)],
}


@pytest.mark.parametrize(
    "world_size, num_steps, like_nccl",
    [
        *((world_size, num_steps, False) for world_size in (1, 2, 4) for num_steps in (1, 2)),
        *((world_size, 2, True) for world_size in (2, 4)),
    ],
)
def test_gradients_of_every_schedule_equal_one_process(world_size, num_steps, like_nccl):
    """fp64, within 1e-12 of the norm; the two copies of a DualPipe stage are summed. Two steps accumulate."""
    ranks = run_distributed(
        toy.run_schedules,
        world_size,
        timeout=90,
        init=world_size > 1,
        names=NAMES[world_size],
        num_steps=num_steps,
        like_nccl=like_nccl,
    )
    for name, num_microbatches in NAMES[world_size]:
        schedule = build_schedule(name, world_size, num_microbatches)
        losses, grads = toy.reference(schedule.num_stages, num_microbatches)
        results = [rank[name, num_microbatches] for rank in ranks]

        seen = {m: value for result in results for m, value in result["losses"].items()}
        assert seen == pytest.approx(losses, rel=1e-12)

        for stage, expected in grads.items():
            copies = [result["grads"][stage] for result in results if stage in result["grads"]]
            assert len(copies) == schedule.num_directions
            for parts, reference in zip(zip(*copies, strict=True), expected, strict=True):
                difference = sum(parts) - num_steps * reference
                assert difference.norm() <= 1e-12 * reference.norm(), (name, stage)
        computed = [count for result in results for layer in result["computed"].values() for count in layer]
        assert set(computed) == {num_steps * num_microbatches // schedule.num_directions}


def slow_rank(rank: int, world_size: int) -> str:
    """Rank 1 stands still in its first backward; rank 0 must not wait for ever."""
    p2p = PipelineP2P([0, 1], toy.tensor_spec, timeout_s=0.5)
    if cpu.is_like_nccl():  # what ends the wait there is the communicator's limit, not ours
        cpu.behave_like_nccl(limit_s=2)
    runner, stages = toy.build(build_schedule("dualpipe", 2, 4), rank, p2p)
    if rank == 1:
        for stage in stages.values():
            stage.backward = lambda *_: time.sleep(4)  # type: ignore[method-assign]
    try:
        runner.step()
    except Exception as error:
        return f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', ()))}"
    return "finished"


def test_a_message_that_does_not_arrive_is_named_within_the_time_limit():
    start = time.monotonic()
    answers = run_distributed(slow_rank, 2, timeout=60)
    assert time.monotonic() - start < 30
    assert answers[0].startswith(
        "PipelineTimeout: pipeline rank 0 got no gradient for stage 0, direction 0, microbatch 0 "
    )
    assert "(rank 1 to rank 0) within 0.5 s" in answers[0]
    assert "while pipeline rank 0 ran" in answers[0]


def wrong_shape(rank: int, world_size: int) -> None:
    p2p = PipelineP2P([0, 1], toy.tensor_spec, timeout_s=2)
    runner, stages = toy.build(build_schedule("1f1b", 2, 2), rank, p2p)
    if rank == 0:
        stages[0].module = torch.nn.Linear(toy.width(0), 17, dtype=torch.float64)
    runner.step()


def test_an_output_of_the_wrong_shape_is_refused_before_it_is_sent():
    with pytest.raises(
        DistributedFailure, match=r"activation for stage 1.*got torch.float64 \(3, 17\), expected"
    ):
        run_distributed(wrong_shape, 2, timeout=60)


def busy_receiver(rank: int, world_size: int) -> list:
    """A receiver that computes for long must not hold up the sender."""
    spec = lambda message: ((64, 1024), torch.float64)  # noqa: E731
    p2p = PipelineP2P([0, 1], spec, timeout_s=20, receives_ahead=1)

    class Stage:
        def forward(self, which, activation):
            time.sleep(0.3 if rank == 1 else 0)
            return (
                torch.full((64, 1024), float(which.microbatch)).double()
                if rank == 0
                else check(which, activation)
            )

    def check(which, activation):
        assert activation.unique().tolist() == [which.microbatch]

    schedule = build_schedule("1f1b", 2, 4).forward_only()
    torch.distributed.barrier()
    return PipelineRunner(schedule, rank, {rank: Stage()}, p2p).step()  # type: ignore[dict-item]


def test_sends_complete_in_the_background():
    """Rank 0 is through with four forwards long before rank 1 has taken them; all arrive intact and in
    order."""
    sender, receiver = run_distributed(busy_receiver, 2, timeout=60)
    assert sender[-1].end < 0.3
    assert receiver[-1].end > 1.2
    assert [event.action.microbatch for event in receiver] == [0, 1, 2, 3]


def test_last_gradient_of_a_stage_is_marked():
    """What gradient reduction hangs on: after the mark no B or W of the stage follows, and B-input alone is
    none."""
    for name in ("1f1b", "zb1p", "dualpipe", "dualpipev", "interleaved_1f1b_overlap"):
        schedule = build_schedule(name, 4, 8)
        for rank in range(4):
            passes = [slot.which for _, slots in _program(schedule, rank) for slot in slots]
            for stage, _ in schedule.stages_of(rank):
                own = [p for p in passes if p.action.stage == stage]
                assert [p.first for p in own] == [True] + [False] * (len(own) - 1)
                marked = [i for i, p in enumerate(own) if p.last]
                assert len(marked) == 1
                assert own[marked[0]].action.kind in (Kind.B, Kind.W)
                assert all(p.action.kind not in (Kind.B, Kind.W) for p in own[marked[0] + 1 :])


def test_runner_refuses_wrong_stages_and_missing_channels():
    schedule = build_schedule("dualpipe", 2, 4)
    with pytest.raises(ValueError, match=r"stages=\[0\]: rank 0 of dualpipe holds \[0, 1\]"):
        PipelineRunner(schedule, 0, {0: object()}, None)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"p2p=None: dualpipe on 2 ranks needs"):
        PipelineRunner(schedule, 0, {0: object(), 1: object()}, None)  # type: ignore[dict-item]


def test_a_failing_stage_names_rank_and_action():
    class Failing:
        def forward(self, which, activation):
            raise FloatingPointError("inf in layer 3")

    with pytest.raises(FloatingPointError) as failure:
        PipelineRunner(build_schedule("1f1b", 1, 1), 0, {0: Failing()}, None).step()  # type: ignore[dict-item]
    assert failure.value.__notes__ == [
        f"while pipeline rank 0 ran {Action(Kind.F, 0, 0, 0)} (microbatch@stage)"
    ]
