"""SIGKILL of one rank, in compute, p2p or a save: all ranks end and name it, and the run goes on from the last save.

Real trainers without a launcher beside them, so nobody ends the survivors but themselves.
"""

import functools
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.resilience import checkpoints
from dsv3_megatron.resilience.watch import EXIT_STATUS
from tests.resilience.ranks import SCHEDULES, WORDS, Ended, run_to_the_end

TIMEOUT_S = 60.0  # of a rank that is silent; one whose process has ended is noticed at once
BOUND_S = 10.0
STEP = 3  # counted from 0; its save is the second one


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mine:
    """Kills this process at the `count`-th call of a function once step `STEP` has begun."""

    def __init__(self, holder: Any, name: str, count: int, after: bool = False) -> None:
        self.original, self.left, self.after, self.armed = getattr(holder, name), count, after, False

        @functools.wraps(self.original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.call(*args, **kwargs)

        setattr(holder, name, call)
        from dsv3_megatron.training import hooks

        hooks.before_step(self.arm)

    def arm(self, call: dict[str, Any]) -> None:
        self.armed = self.armed or call["iteration"] == STEP

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= self.armed
        if self.left == 0 and not self.after:
            die()
        result = self.original(*args, **kwargs)
        if self.left == 0:
            die()
        return result


def lay_mine(rank: int, victim: int, moment: str) -> None:
    if rank != victim:
        return
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import checkpointing

    from dsv3_megatron.backends import attention
    from dsv3_megatron.dualpipe.p2p import PipelineP2P

    match moment:
        case "compute":
            Mine(attention, "_attend", 3)
        case "p2p 1f1b":
            Mine(dist, "batch_isend_irecv", 3, after=True)
        case "p2p dualpipe":
            Mine(PipelineP2P, "send", 3, after=True)
        case "save: data":
            Mine(filesystem_async, "_write_item", 9)
        case "save: mark":  # opened, and so emptied, but not written
            Mine(checkpointing.maybe_msc, "open", 1, after=True)
        case "save: tracker":  # the same for the tracker; the checkpoint is complete
            Mine(checkpointing.maybe_msc, "open", 2, after=True)


def check_all_ended(ended: list[Ended], victim: int) -> None:
    for rank, how in enumerate(ended):
        if rank == victim:
            assert how.status == -signal.SIGKILL, how.output[-2000:]
            continue
        assert how.status == EXIT_STATUS, (rank, how.status, how.output[-3000:])
        assert how.after_s < BOUND_S
        last = how.output.strip().splitlines()[-1]
        assert last.startswith(f"[rank {rank}] ends (") and f"rank {victim} is lost" in last, last


def kill_and_resume(
    tmp_path: Path, schedule: str, moment: str, victim: int, world_size: int = 2, *more: str
) -> None:
    save = tmp_path / "checkpoints"
    words = [
        *WORDS,
        *SCHEDULES[schedule],
        *more,
        "--save",
        str(save),
        "--load",
        str(save),
        "--save-interval",
        "2",
    ]
    last = 6 if moment == "save: tracker" else 4
    words += ["--train-iters", str(last), "--rank-timeout-s", str(TIMEOUT_S)]
    prepare = partial(lay_mine, victim=victim, moment=moment)
    check_all_ended(run_to_the_end(tmp_path / "killed", world_size, words, prepare), victim)
    expected = 4 if moment == "save: tracker" else 2
    assert checkpoints.complete_iterations(save)[-1] == expected
    resumed = run_to_the_end(tmp_path / "resumed", world_size, words)
    assert [how.status for how in resumed] == [0] * world_size, resumed[-1].output[-3000:]
    assert f"from {save} at iteration {expected}" in " ".join(resumed[0].output.split())
    assert f"iteration        {last}/" in resumed[-1].output
    assert checkpoints.complete_iterations(save)[-1] == last


@pytest.mark.parametrize(
    ("schedule", "moment", "victim"),
    [
        pytest.param("dualpipe", "compute", 1, marks=pytest.mark.slow),
        pytest.param("dualpipe", "p2p dualpipe", 0, marks=pytest.mark.slow),
        ("dualpipe", "save: data", 1),
        pytest.param("1f1b", "p2p 1f1b", 1, marks=pytest.mark.slow),
        pytest.param("1f1b", "save: mark", 0, marks=pytest.mark.slow),
        pytest.param("1f1b", "save: tracker", 0, marks=pytest.mark.slow),
    ],
)
def test_killed_rank(schedule: str, moment: str, victim: int, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, schedule, moment, victim)


@pytest.mark.slow
def test_killed_rank_of_four(tmp_path: Path) -> None:
    """With expert parallelism: the victim's neighbours wait in an all-to-all, its mirror in the pipeline."""
    kill_and_resume(tmp_path, "dualpipe", "compute", 2, 4, "--expert-model-parallel-size", "2")
