"""The kernels on tiny shapes under compute-sanitizer's memcheck, and a planted fault that it must find."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_megatron.fp8 import kernels
from tests.gpu.device import REHEARSAL

pytestmark = pytest.mark.gpu
Record = Callable[[str, object], None]
ROOT = Path(__file__).parents[2]


def sanitizer() -> list[str]:
    """The command before a program; in a rehearsal there is no device to watch."""
    if REHEARSAL:
        return []
    found = shutil.which("compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer is not on PATH")
    return [found, "--tool", "memcheck", "--error-exitcode", "9"]


def under_sanitizer(*words: str) -> subprocess.CompletedProcess:
    # torch's allocator rounds up and keeps blocks: without it, each tensor has bounds of its own.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*sanitizer(), sys.executable, "-m", "tests.gpu.tiny_kernels", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine's device")  # seen under gVisor
    return done


def test_no_kernel_leaves_its_tensors(record_property: Record) -> None:
    done = under_sanitizer()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    ran = next(line.split()[1:] for line in output.splitlines() if line.startswith("ran "))
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    record_property("sanitizer", "memcheck" if summary else "none: a rehearsal")
    record_property("faults", summary[1] if summary else "not looked for")
    record_property("kernels", len(ran))
    assert set(ran) == set(kernels.__all__)
    assert REHEARSAL or (summary is not None and summary[1] == "0")


def test_a_planted_fault_is_found(record_property: Record) -> None:
    if REHEARSAL:
        pytest.skip("a rehearsal: nothing watches memory on CPU")
    done = under_sanitizer("planted")
    record_property("planted", "found" if done.returncode else "not found")
    assert done.returncode != 0
    assert "Invalid __global__ write" in done.stdout + done.stderr
