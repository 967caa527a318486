"""Trainers that are left to end by themselves: exit status, duration and output of each rank.

`tests.harness.run_distributed` ends all ranks soon after one has failed, which is what these tests wait for.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.studies.ports import free_port
from tests.arguments.lines import MICRO
from tests.harness.pool import _context

SCHEDULES = {"1f1b": [], "dualpipe": ["--pipeline-schedule", "dualpipe"]}
WORDS = [
    *("--spec", "dsv3", "--device", "cpu", *MICRO, "--use-distributed-optimizer", "--log-interval", "1"),
    *("--pipeline-model-parallel-size", "2", "--lr-warmup-iters", "1", "--lr-decay-iters", "6"),
]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: status as `Process.exitcode` (−9: killed), seconds after the first rank did, its output."""

    status: int | None
    after_s: float
    output: str


def train(words: list[str], prepare: Callable[[int], None] | None = None) -> None:
    """What a rank does: the trainer's command, after `prepare(rank)` has laid its mines."""
    if prepare is not None:
        prepare(int(os.environ["RANK"]))
    sys.argv = ["train.py", *words]
    from dsv3_megatron.train import command

    command()


def run_to_the_end(
    folder: Path, world_size: int, words: list[str], prepare: Any = None, bound_s: float = 40.0
) -> list[Ended]:
    """Start the ranks and wait; those that have not ended `bound_s` after the first one are killed, status None.

    Args:
        prepare: picklable, called with the rank before the trainer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["LOCAL_WORLD_SIZE"] = str(world_size)
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    processes = []
    for rank in range(world_size):
        process = _context().Process(target=_main, args=(rank, environment, logs[rank], words, prepare))
        process.start()
        processes.append(process)
    ended_at: dict[int, float] = {}
    start = time.monotonic()
    while len(ended_at) < world_size:
        for rank, process in enumerate(processes):
            if rank not in ended_at and not process.is_alive():
                ended_at[rank] = time.monotonic()
        if time.monotonic() - min(ended_at.values(), default=start + 400) > bound_s:
            break
        time.sleep(0.05)
    first = min(ended_at.values(), default=start)
    result = []
    for rank, process in enumerate(processes):
        status = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also the checkpoint writer that a killed rank has left
        process.join()
        output = logs[rank].read_text(errors="replace")
        result.append(Ended(status, ended_at.get(rank, float("inf")) - first, output))
    return result


def _main(rank: int, environment: dict[str, str], log: Path, words: list[str], prepare: Any) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    status = 0
    try:
        train(words, prepare)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as the interpreter would, without the destructors of broken process groups
