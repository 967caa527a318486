"""Ranks that fail or are interrupted: the error names the cause, and no process is left."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = """
import sys
from pathlib import Path
from dsv3_megatron.demo.launch import RunFailed, RunInterrupted, run_ranks
status = 0
for deed in sys.argv[2:]:
    try:
        run_ranks("tests.demo.launched", [deed], 2, Path(sys.argv[1]) / deed)
    except (RunFailed, RunInterrupted) as error:
        print(f"[{deed}] {type(error).__name__}: {error}", file=sys.stderr)
        status = 1
sys.exit(status)
"""


def start(folder: Path, *deeds: str) -> subprocess.Popen:
    """Runs one after the other, each with its logs in `folder / deed`."""
    # In a session of its own: a Ctrl-C of the test must not reach pytest.
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(folder), *deeds],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of live ranks: they write their logs below `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in environment:
            found.append((process / "cmdline").read_text())
    return found


FAILURES = {
    "raise": "RunFailed: rank 1 failed: RuntimeError: no such expert",
    "die": "RunFailed: rank 1 was ended by signal SIGKILL",
    "exit": "RunFailed: rank 1 exited with status 3",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the errors of three failed runs of one process."""
    folder = tmp_path_factory.mktemp("failed")
    process = start(folder, *FAILURES)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    return folder, errors


@pytest.mark.parametrize("deed", FAILURES)
def test_failed_rank_is_named_and_the_others_are_ended(failed, deed):
    folder, errors = failed
    named = re.search(rf"\[{deed}\] {re.escape(FAILURES[deed])}\n.*?its output: (\S+)", errors)
    assert named, errors
    assert Path(named[1]).exists() and Path(named[1]).is_relative_to(folder / deed)
    assert processes_of(folder / deed) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interruption_ends_all_ranks(tmp_path, name):
    process = start(tmp_path, "wait")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("wait/*/attempt_0/*/stdout.log"))) < 2 or len(processes_of(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    # Ctrl-C reaches the whole foreground group, `kill` the one process.
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"RunInterrupted: ended by {name}" in errors
    assert processes_of(tmp_path) == []


def test_output_of_the_last_rank_is_shown(tmp_path):
    output, errors = start(tmp_path, "end").communicate(timeout=60)
    assert output.splitlines() == ["[demo] hello from rank 1 of 2"], errors
