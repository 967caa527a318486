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
try:
    run_ranks("tests.demo.launched", [sys.argv[1]], 2, Path(sys.argv[2]))
except (RunFailed, RunInterrupted) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start(deed: str, folder: Path) -> subprocess.Popen:
    # In a session of its own: a Ctrl-C of the test must not reach pytest.
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, deed, str(folder)],
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


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("raise", "RunFailed: rank 1 failed: RuntimeError: no such expert"),
        ("die", "RunFailed: rank 1 was ended by signal SIGKILL"),
        ("exit", "RunFailed: rank 1 exited with status 3"),
    ],
)
def test_failed_rank_is_named_and_the_others_are_ended(tmp_path, deed, message):
    process = start(deed, tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in errors
    named = re.search(r"its output: (\S+)", errors)
    assert named and Path(named[1]).exists()
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interruption_ends_all_ranks(tmp_path, name):
    process = start("wait", tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/attempt_0/*/stdout.log"))) < 2 or len(processes_of(tmp_path)) < 2:
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
    output, errors = start("end", tmp_path).communicate(timeout=60)
    assert output.splitlines() == ["[demo] hello from rank 1 of 2"], errors
