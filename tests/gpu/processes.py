"""Commands with a time limit, each in a process group of its own; nothing that they start outlives them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.studies.ports import free_port

LINGER_S = 10.0  # what the other ranks get to end by themselves once one has failed
_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, None where it was killed at its limit; seconds; its output."""

    status: int | None
    seconds: float
    output: str


class RanksFailed(AssertionError):
    """A rank failed or hung; the text names it and holds the end of its output."""


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent has ended, so that `end_all` finds it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(
    command: Sequence[str],
    limit_s: float,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    show: Callable[[str], None] | None = None,
) -> Ended:
    """Run `command` with its output in `log` (lines go to `show` as they come); at the limit it is killed.

    Whatever it has started is killed with it, and also when it ends by itself. To be called where nothing else runs
    below this process.
    """
    start = time.monotonic()
    with open(log, "wb") as output, open(log, "rb") as reader:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
        )
        status: int | None = None
        try:
            while (status := process.poll()) is None and time.monotonic() - start < limit_s:
                time.sleep(0.1)
                _show(reader, show)
        finally:
            end_all(process)
        _show(reader, show)
    return Ended(status, time.monotonic() - start, log.read_text(errors="replace"))


def _show(reader, show: Callable[[str], None] | None) -> None:
    text = reader.read().decode(errors="replace")
    if show is not None and text:
        show(text)


def end_all(process: subprocess.Popen) -> None:
    """Kill the group of `process`, and everything below this process, sessions of their own included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(100):
        alive = below(os.getpid())
        if not alive:
            return
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def below(ancestor: int) -> list[int]:
    """Processes that `ancestor` started, or that those started, and so on."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # pid (name) state parent …; a name may hold brackets
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: list[int] = []
    new = [ancestor]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        found += new
    return found


def run_ranks(
    module: str,
    words: Sequence[str],
    num_ranks: int,
    folder: Path,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    num_gpus: int | None = None,
) -> list[str]:
    """Run `python -m module words` on `num_ranks` ranks of one process group, and return what each printed.

    torchrun puts each rank into a session of its own: where only torchrun is killed, hung ranks stay on the GPU.

    Args:
        folder: for the ranks' output, rank0.log and so on.
        limit_s: past it all ranks are killed.
        num_gpus: GPUs that the ranks share; default: one each.

    Raises:
        RanksFailed: a rank ended with another status than 0, or not in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = {**os.environ, **(env or {}), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(num_ranks)}
    logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
    ranks: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            local = rank % (num_gpus or num_ranks)
            with open(log, "wb") as output:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *words],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=common | {"RANK": str(rank), "LOCAL_RANK": str(local)},
                        process_group=ranks[0].pid if ranks else 0,
                    )
                )
        statuses = _wait(ranks, limit_s)
    finally:
        _end_ranks(ranks)
    printed = [log.read_text(errors="replace") for log in logs]
    bad = [rank for rank, status in enumerate(statuses) if status != 0]
    if bad:
        # Where one has failed, those that were ended with it have nothing to say.
        told = [rank for rank in bad if statuses[rank] is not None] or bad
        raise RanksFailed(
            "\n".join(
                f"rank {rank} {_how(statuses[rank], limit_s)}; its output ends:\n{printed[rank][-3000:]}"
                for rank in told[:2]
            )
        )
    return printed


def _how(status: int | None, limit_s: float) -> str:
    return f"had not ended after {limit_s:g} s" if status is None else f"ended with status {status}"


def _wait(ranks: Sequence[subprocess.Popen], limit_s: float) -> list[int | None]:
    """Exit statuses when all have ended, or the limit has come; None of those that had not."""
    deadline = time.monotonic() + limit_s
    failed = False
    while time.monotonic() < deadline:
        statuses = [rank.poll() for rank in ranks]
        if None not in statuses:
            return statuses
        if not failed and any(status not in (None, 0) for status in statuses):
            failed = True
            deadline = min(deadline, time.monotonic() + LINGER_S)
        time.sleep(0.1)
    return [rank.poll() for rank in ranks]


def _end_ranks(ranks: Sequence[subprocess.Popen]) -> None:
    """Kill the ranks' group and all that the ranks started."""
    started = [pid for rank in ranks for pid in below(rank.pid)]
    if ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks[0].pid, signal.SIGKILL)
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()
