"""What can be tested of `make test-gpu` without a GPU: refusal, and the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.run import obstacle

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("num_gpus", "has_te", "reason"),
    [
        (0, True, "no CUDA GPU"),
        (3, True, "3 GPUs are visible"),
        (8, False, "Transformer Engine is not installed"),
    ],
)
def test_a_machine_that_cannot_run_them_is_named(num_gpus, has_te, reason):
    assert reason in obstacle(num_gpus, has_te)


def test_a_machine_that_can():
    assert obstacle(4, True) is None


def test_without_a_gpu_it_says_so_and_fails():
    command = [sys.executable, "-m", "tests.gpu.run"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=hidden)
    assert done.returncode == 1
    assert "no CUDA GPU is visible. Nothing was run" in done.stderr


def test_report_holds_results_figures_and_reasons(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(record_property):\n    record_property('loss', 1.25)\n"
        "def test_bad():\n    assert 1 == 2\n"
        "def test_skipped():\n    pytest.skip('too few')\n"
        "@pytest.fixture\ndef broken():\n    raise ValueError('no device')\n"
        "def test_broken(broken):\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.gpu.report"]
    command += [
        "--gpu-report",
        str(tmp_path / "out"),
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        str(tmp_path / "test_it.py"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["test"].split("::")[1]: row for row in report["tests"]}
    results = {name: row["result"] for name, row in rows.items()}
    assert results == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_broken": "failed",
    }
    assert report["counts"] == {"failed": 2, "passed": 1, "skipped": 1}
    assert rows["test_good"]["figures"] == {"loss": 1.25}
    assert "1 == 2" in rows["test_bad"]["reason"] and "no device" in rows["test_broken"]["reason"]
    assert report["exit_status"] == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "test_good | passed" in text and "loss = 1.25" in text
