"""Every training run of the GPU tests without its GPUs: the tests' own code, the command lines, the time they get.

What a test puts together and reads is run with runs that are only written down (`written_down`), on eight imagined
GPUs; then each line goes through the check that a GPU job goes through (`dsv3 preflight`).
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.gpu.stages import all_steps
from tests.preflight.test_walk import walk

ROOT = Path(__file__).parents[2]
FILES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    if re.search(r"^pytestmark = pytest\.mark\.gpu$", path.read_text(), re.MULTILINE)
    and re.search(r"\btrain\(", path.read_text())
]
SECONDS_OF_A_RUN = 30  # of small models: mostly imports and communicators


@cache
def written_down() -> list[dict[str, Any]]:
    """The lines, by the tests that start them; every test has passed."""
    with TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "tests.gpu.written_down"]
        command += ["-p", "no:cacheprovider", "-o", "addopts=", f"--lines={lines}", *FILES]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"DSV3_TEST_DEVICE": "gpu"}, capture_output=True, text=True
        )
        assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-4000:]
        return [json.loads(line) for line in lines.read_text().splitlines()]


def test_every_test_that_trains_runs_to_its_end() -> None:
    """On 1, 2, 4 and 8 GPUs, with Transformer Engine and DeepEP."""
    assert len(FILES) == 4
    assert {line["test"].split("::")[0] for line in written_down()} == set(FILES)
    assert {line["gpus"] or 1 for line in written_down()} == {1, 2, 4, 8}
    shared = [line for line in written_down() if line["gpus"] and line["ranks"] > line["gpus"]]
    assert shared and all(line["env"].get("DSV3_STAGED") == "1" for line in shared)


def test_every_step_has_time_for_its_runs() -> None:
    for _, step in all_steps():
        mine = [line for line in written_down() if line["test"].startswith(tuple(step.tests))]
        assert step.limit_s >= SECONDS_OF_A_RUN * len(mine), (step.name, len(mine))


def task(line: dict[str, Any], build: bool) -> dict[str, Any]:
    words = ["torchrun", f"--nproc-per-node={line['ranks']}", "-m", "dsv3_megatron.train", *line["words"]]
    machine = {"te": "2.20", "apex": "absent", "deepep": "present"}
    return {"line": words, "machines": [machine], "build": build}


def errors_of(lines: list[dict[str, Any]], build: bool) -> dict[str, list[dict[str, str]]]:
    """Of every different line (folders left out), and of one with a word spelt wrong: the control."""
    different = {re.sub(r"/\S+", "…", " ".join([str(line["ranks"]), *line["words"]])): line for line in lines}
    chosen = list(different.values())
    good = next(line for line in chosen if "--pipeline-schedule" in line["words"])
    words = ["--pipeline-shedule" if word == "--pipeline-schedule" else word for word in good["words"]]
    chosen.append(good | {"test": "control", "words": words})
    answers = walk([task(line, build) for line in chosen])
    found: dict[str, list[dict[str, str]]] = {}
    for line, [findings] in zip(chosen, answers, strict=True):
        found.setdefault(line["test"], []).extend(f for f in findings if f["severity"] == "error")
    assert any(error["argument"].startswith("--pipeline-shedule") for error in found.pop("control"))
    return {test: errors for test, errors in found.items() if errors}


def test_every_line_on_eight_gpus_passes_preflight() -> None:
    """Arguments, refusals and Megatron's own validation."""
    lines = [line for line in written_down() if line["gpus"] == 8]
    assert len(lines) >= 14
    assert errors_of(lines, build=False) == {}


@pytest.mark.slow
def test_every_line_passes_preflight_and_its_model_is_built() -> None:
    """On the meta device, with the groups of all ranks."""
    assert errors_of(written_down(), build=True) == {}
