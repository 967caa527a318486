"""Megatron-LM's own unit tests under the CPU runtime.

    MEGATRON_LM_SOURCE=<checkout of core_v0.19.0> pytest tests/cpu/test_upstream.py -m slow

The tests come from the checkout, `megatron` from the installed wheel. What passes is listed in docs/cpu.md.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.harness.pool import free_port

SOURCE = os.environ.get("MEGATRON_LM_SOURCE")
REPOSITORY = Path(__file__).parents[2]

# (file below tests/unit_tests, ranks, tests that pass on every rank, tests that fail or err and why)
FILES: list[tuple[str, int, int, str]] = []

# Loaded before the checkout's conftest, which would download data sets that these files do not use.
NO_DOWNLOAD = """
from tests.test_utils.python_scripts import download_unit_tests_dataset

download_unit_tests_dataset.download_and_extract_asset = lambda **_: None
"""


def run_upstream(folder: Path, file: str, num_ranks: int, *words: str) -> tuple[Counter[str], str]:
    """Runs one file; returns the counts of the rank that passed least, and the output."""
    if not (folder / "tests").exists():
        (folder / "tests").symlink_to(Path(str(SOURCE)) / "tests")
        (folder / "no_download.py").write_text(NO_DOWNLOAD)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += [
        "--master-port",
        str(free_port()),
        "-m",
        "dsv3_megatron.cpu",
        "-m",
        "pytest",
        "-p",
        "no_download",
    ]
    command += ["-q", "--tb=short", "-o", "addopts=", f"tests/unit_tests/{file}", *words]
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *more]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
    output = run.stdout + run.stderr
    outcome = r"\d+ (?:passed|failed|errors?|skipped|deselected|warnings?)"
    summaries = re.findall(rf"((?:{outcome}(?:, )?)+) in [\d.]+s", output)
    counts = [Counter({kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", line)}) for line in summaries]
    assert len(counts) == num_ranks, output[-6000:]
    return min(counts, key=lambda count: count["passed"]), output
