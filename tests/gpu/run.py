"""`make test-gpu`: run the tests marked `gpu` on all visible GPUs, and report what ran, with its figures.

The report is runs/gpu_report/report.json and report.md. Without a usable machine nothing runs and the exit
status is 1.
"""

import importlib.util
import os
import sys

GPU_COUNTS = (1, 2, 4, 8)
REPORT_DIR = "runs/gpu_report"


def obstacle(num_gpus: int, has_te: bool) -> str | None:
    """Why the tests cannot run on this machine, or None."""
    if num_gpus == 0:
        return "make test-gpu: no CUDA GPU is visible. Nothing was run, and nothing is reported."
    if num_gpus not in GPU_COUNTS:
        return (
            f"make test-gpu: {num_gpus} GPUs are visible; the layouts are for {GPU_COUNTS}. "
            "Choose with CUDA_VISIBLE_DEVICES."
        )
    if not has_te:
        return (
            "make test-gpu: Transformer Engine is not installed, and the reference is compared with it. "
            "Install it: .venv/bin/pip install -e '.[te]'"
        )
    return None


def main() -> int:
    import torch

    has_te = importlib.util.find_spec("transformer_engine") is not None
    reason = obstacle(torch.cuda.device_count() if torch.cuda.is_available() else 0, has_te)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    import pytest

    os.environ["DSV3_TEST_DEVICE"] = "gpu"  # read by tests/conftest.py: no CPU stand-ins
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # pairs and messages overlap
    options = ["-m", "gpu", "-p", "tests.gpu.report", f"--gpu-report={REPORT_DIR}", *sys.argv[1:]]
    return int(pytest.main(["tests", *options]))


if __name__ == "__main__":
    sys.exit(main())
