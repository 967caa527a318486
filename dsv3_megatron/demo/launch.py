"""Start the ranks as `torchrun` does, show the progress of the last one, and say why a run ended early."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Megatron's line of an iteration, e.g. " [2025-01-01 00:00:00.000000] iteration       10/     240 | … | lm
# loss: 7.1E+00 | …"
_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_FIELD = re.compile(r"\| ([^|:]+): *([-+0-9.eE]+) ")


class RunFailed(RuntimeError):
    """A rank failed; the message says which one, and why."""


class RunInterrupted(RuntimeError):
    """The run was ended by a signal; the message names it."""


def run_ranks(module: str, argv: list[str], num_ranks: int, log_dir: Path) -> None:
    """Run `python -m module argv` on `num_ranks` local ranks; their output goes to files in `log_dir`.

    Raises:
        RunFailed: a rank ended with an error; the others have been ended.
        RunInterrupted: SIGINT or SIGTERM came; all ranks have been ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    log_dir.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(log_dir=str(log_dir), redirects=Std.ALL),
    )
    try:
        with _shown_progress(log_dir, num_ranks - 1):
            elastic_launch(config, sys.executable)("-m", module, *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RunFailed(
            f"rank {rank} {_cause(failure)}\nits output: {_last_log(log_dir, rank, 'stderr.log')}"
        ) from None
    except SignalException as error:
        raise RunInterrupted(f"ended by {signal.Signals(error.sigval).name}") from None


def _cause(failure) -> str:
    """Why a rank failed: the exception it recorded, or the signal or status it ended with."""
    message = failure.message
    if isinstance(message, dict):
        return f"failed: {message.get('message', message)}"
    if failure.exitcode < 0:
        return f"was ended by signal {failure.signal_name()}"
    return f"exited with status {failure.exitcode}"


def _last_log(log_dir: Path, rank: int, name: str) -> Path | None:
    """Newest log file of a rank; torch puts each run into a new folder."""
    files = list(log_dir.glob(f"*/attempt_0/{rank}/{name}"))
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


@contextmanager
def _shown_progress(log_dir: Path, rank: int) -> Iterator[None]:
    old = set(log_dir.glob("*"))
    done = threading.Event()

    def follow() -> None:
        position = 0
        show = progress_printer()
        while True:
            finished = done.is_set()
            new = [
                path for path in log_dir.glob(f"*/attempt_0/{rank}/stdout.log") if path.parents[2] not in old
            ]
            if new:
                with open(new[0], errors="replace") as file:
                    file.seek(position)
                    text = file.read()
                complete = text[: text.rfind("\n") + 1]
                position += len(complete.encode())
                for line in complete.splitlines():
                    show(line)
            if finished:
                return
            done.wait(1.0)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def progress_printer(print_line: Callable[[str], None] | None = None) -> Callable[[str], None]:
    """A function that takes lines of Megatron's log and prints a short one for each tenth iteration.

    Lines that begin with `[demo]` are passed on.
    """
    emit = print_line or (lambda line: print(line, flush=True))

    def show(line: str) -> None:
        if line.startswith("[demo]"):
            emit(line)
            return
        if not (found := _ITERATION.search(line)):
            return
        iteration, last = int(found[1]), int(found[2])
        if iteration % 10 and iteration != last:
            return
        fields = {name.strip(): float(value) for name, value in _FIELD.findall(line)}
        seconds = fields["elapsed time per iteration (ms)"] / 1000
        mtp = f"  MTP loss {fields['mtp_1 loss']:.3f}" if "mtp_1 loss" in fields else ""
        emit(
            f"[demo] iteration {iteration}/{last}  loss {fields['lm loss']:.3f}{mtp}  "
            f"{seconds:.2f} s/iteration, ETA {seconds * (last - iteration):.0f} s"
        )

    return show
