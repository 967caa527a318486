"""One run in a folder: who is refused, who takes over, and who leaves nothing behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.resilience import lock
from dsv3_megatron.resilience.lock import NAME, Holder, held
from tests.arguments.lines import MICRO
from tests.resilience.ranks import SCHEDULES, WORDS, run_to_the_end

HOLD = """
import sys, time
from pathlib import Path
from dsv3_megatron.resilience.lock import take
from dsv3_megatron.errors import RefusedArgument
try:
    take(Path(sys.argv[1]), int(sys.argv[3]), float(sys.argv[2]))
except RefusedArgument as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("held", flush=True)
time.sleep(float(sys.argv[4]))
"""


def start(folder: Path, timeout_s: float = 60, rank: int = 0, lives_s: float = 60) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(folder), str(timeout_s), str(rank), str(lives_s)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = start(folder, **options)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def refusal(folder: Path, rank: int = 0, timeout_s: float = 60.0) -> str:
    """The error of another run that begins, "" where it may."""
    try:
        with held(folder, rank, timeout_s):
            return ""
    except RefusedArgument as error:
        return str(error)


def write(folder: Path, age_s: float = 0.0, **changes: Any) -> None:
    """A lock of a holder that is this process, but for the changes."""
    holder = {**vars(Holder.me()), **changes}
    (folder / NAME).write_text(json.dumps(holder))
    os.utime(folder / NAME, (time.time() - age_s, time.time() - age_s))


def test_a_second_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        message = refusal(tmp_path)
        assert message.startswith(
            f"--save {tmp_path}: a run that is alive saves there (process {first.pid} on "
        )
        assert socket.gethostname() in message and re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", message)
        second = start(tmp_path)
        assert second.communicate(timeout=60)[0].startswith("refused --save") and second.returncode == 2
        assert json.loads((tmp_path / NAME).read_text())["process"] == first.pid


def test_a_killed_run_leaves_a_lock_that_is_no_hindrance(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / NAME).exists()
    began = time.monotonic()
    assert refusal(tmp_path) == "" and time.monotonic() - began < 2
    assert not (tmp_path / NAME).exists()


def test_a_killed_run_that_nobody_has_waited_for(tmp_path: Path) -> None:
    """A zombie still has its number."""
    with running(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while lock._birth(first.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert refusal(tmp_path) == ""


def test_it_is_given_up_at_the_end_and_on_errors(tmp_path: Path) -> None:
    with held(tmp_path, 0, 60):
        assert (tmp_path / NAME).exists()
    assert not (tmp_path / NAME).exists()
    with pytest.raises(ZeroDivisionError), held(tmp_path, 0, 60):
        _ = 1 / 0
    assert not (tmp_path / NAME).exists() and list(tmp_path.iterdir()) == []


def test_a_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    write(tmp_path)  # this very process: alive
    assert "a run that is alive" in refusal(tmp_path)
    write(tmp_path, birth=1)
    assert refusal(tmp_path) == ""


def test_after_a_reboot_numbers_mean_nothing(tmp_path: Path) -> None:
    write(tmp_path, age_s=1000, system="before the reboot")
    assert refusal(tmp_path, timeout_s=60) == ""


def test_a_run_on_another_machine_shows_signs_of_life(tmp_path: Path) -> None:
    """Its process cannot be asked; its file's time of change can."""
    write(tmp_path, system="elsewhere", host="elsewhere", process=7)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "(process 7 on elsewhere, since" in refusal(tmp_path, timeout_s=5)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", [None, "", '{"host": "x"', "[]"])
def test_a_silent_lock_of_another_machine_is_waited_for(content: str | None, tmp_path: Path) -> None:
    """No shorter than the time after which a rank counts as lost, and no longer; also where the file is cut short."""
    write(tmp_path, system="elsewhere")
    if content is not None:
        (tmp_path / NAME).write_text(content)
    began = time.monotonic()
    assert refusal(tmp_path, timeout_s=1.5) == ""
    assert 1.0 < time.monotonic() - began < 6


def test_a_holder_shows_signs_of_life(tmp_path: Path) -> None:
    with held(tmp_path, 0, timeout_s=1.0):
        first = (tmp_path / NAME).stat().st_mtime
        deadline = time.monotonic() + 5
        while (tmp_path / NAME).stat().st_mtime == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / NAME).stat().st_mtime > first


def test_other_ranks_of_a_job_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1111")
    with held(tmp_path, 0, 60):
        assert refusal(tmp_path, rank=1) == ""
        monkeypatch.setenv("MASTER_PORT", "2222")
        assert "a run that is alive" in refusal(tmp_path, rank=1)  # of another job
    assert refusal(tmp_path, rank=1) == ""


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    for _ in range(3):
        write(tmp_path, birth=1)
        processes = [start(tmp_path, lives_s=3) for _ in range(6)]
        lines = [p.stdout.readline().split()[0] for p in processes if p.stdout is not None]
        for process in processes:
            process.kill()
            process.wait()
        assert sorted(lines) == ["held"] + ["refused"] * 5


def test_a_child_that_ends_gives_up_nothing(tmp_path: Path) -> None:
    """Checkpoint writers are forked from the holder."""
    with held(tmp_path, 0, 60):
        pid = os.fork()
        if pid == 0:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        assert (tmp_path / NAME).exists()


@pytest.mark.slow
def test_megatrons_own_entry_point_holds_it_as_well(tmp_path: Path) -> None:
    save = tmp_path / "new" / "save"
    code = (
        "from dsv3_megatron import cpu; cpu.activate(); from dsv3_megatron.arguments import entry;"
        "from megatron.training.arguments import add_megatron_arguments as add; import argparse;"
        "entry.complete_command_line(add(argparse.ArgumentParser(allow_abbrev=False)));"
        f"print(open({str(save / NAME)!r}).read())"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "--spec",
        "dsv3",
        "--transformer-impl",
        "local",
        *MICRO,
        "--save",
        str(save),
        "--save-interval",
        "1",
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 0 and '"process"' in done.stdout, done.stderr[-2000:]
    assert not (save / NAME).exists()  # given up at exit
    with running(save) as first:
        done = run()
        assert done.returncode == 2 and f"process {first.pid} on" in done.stderr, done.stderr[-2000:]


def words(save: Path, *more: str) -> list[str]:
    folders = ["--save", str(save), "--load", str(save), "--save-interval", "2"]
    return [*WORDS, *SCHEDULES["1f1b"], *folders, "--train-iters", "4", *more]


def test_two_trainers(tmp_path: Path) -> None:
    """Two ranks while another process holds the folder, and again once that was killed: no manual step between."""
    save = tmp_path / "save"
    save.mkdir()
    with running(save) as first:
        ended = run_to_the_end(tmp_path / "refused", 2, words(save))
        assert all(rank.status not in (0, None) for rank in ended)
        errors = [line for rank in ended for line in rank.output.splitlines() if line.startswith("error: ")]
        assert (
            len(errors) == 1 and f"process {first.pid} on" in errors[0] and "Traceback" not in ended[0].output
        )
        assert "iteration" not in ended[1].output.split("training ...")[-1] and not list(save.glob("iter_*"))
    ended = run_to_the_end(tmp_path / "first", 2, words(save))
    assert [rank.status for rank in ended] == [0, 0] and not (save / NAME).exists()
    # An evaluation may look on: --skip-train writes nothing, so a run that trains does not stand in its way.
    with running(save):
        ended = run_to_the_end(tmp_path / "look", 2, words(save, "--skip-train", "--eval-iters", "1"))
        assert [rank.status for rank in ended] == [0, 0], ended[0].output[-3000:]
