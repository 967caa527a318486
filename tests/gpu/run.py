"""Run stages of the GPU tests: each step in a process group of its own with a limit, all figures in one report.

    bash gpu_bundle/run.sh 1              one stage, 1 to 4, on one GPU (docs/gpu.md)
    python -m tests.gpu.run               all of them on all visible GPUs: `make test-gpu`
    python -m tests.gpu.run 1 --cpu-rehearsal

Run again, it goes on where it stopped: steps and tests that have passed are not repeated. The exit status is 0 when
every step has passed or was skipped for a stated reason, 1 when one has not, 2 when nothing could be run.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.errors import Parser
from tests.gpu.processes import adopt_orphans, run
from tests.gpu.report import Report
from tests.gpu.stages import STAGES, Step

GPU_COUNTS = (1, 2, 4, 8)
REPORT_DIR = "runs/gpu_report"
ROOT = Path(__file__).parents[2]
REHEARSAL_FACTOR = 3  # times the limits, on a few cores


def obstacle(num_gpus: int) -> str | None:
    """Why the tests cannot run on this machine, or None."""
    if num_gpus == 0:
        return (
            "no CUDA GPU is visible. Nothing was run, and nothing is reported (--cpu-rehearsal needs none)."
        )
    if num_gpus not in GPU_COUNTS:
        return f"{num_gpus} GPUs are visible; the layouts are for {GPU_COUNTS}. Choose with CUDA_VISIBLE_DEVICES."
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="tests.gpu.run", allow_abbrev=False)
    parser.add_argument("stage", nargs="*", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="the same without a GPU, on tiny sizes")
    parser.add_argument("--out", type=Path, default=Path(REPORT_DIR), help="folder of the report")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--only", metavar="STEP", help="one step of the stages")
    args = parser.parse_args(argv)
    for stage in args.stage:
        if stage not in STAGES:
            parser.error(f"stage {stage}: use {', '.join(STAGES)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = _device(args.cpu_rehearsal)
    if device is None:
        return 2
    stages = args.stage or list(STAGES)
    steps = [(stage, step) for stage in stages for step in STAGES[stage].steps]
    if args.only is not None:
        steps = [(stage, step) for stage, step in steps if step.name == args.only]
        if not steps:
            names = [step.name for stage in stages for step in STAGES[stage].steps]
            print(f"--only {args.only}: the steps are {', '.join(names)}", file=sys.stderr)
            return 2
    adopt_orphans()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # a step's processes end with this one
    report = Report(args.out, device)
    print(f"device: {device}; report: {args.out}/report.json, report.md", flush=True)
    results = [_step(report, stage, step, args) for stage, step in steps]
    report.write()
    bad = [result for result in results if result not in ("passed", "skipped")]
    print(
        f"{len(results) - len(bad)} of {len(results)} steps passed or skipped; report: {args.out}/report.md"
    )
    return 1 if bad else 0


def _device(rehearsal: bool) -> str | None:
    """Name of the device; None, with the reason told, where there is none.

    Asked in a process of its own: whoever asks holds memory of the GPU for as long as it lives.
    """
    if rehearsal:
        return "CPU"
    code = "import torch.cuda as c; n = c.is_available() and c.device_count(); print(+n, n and c.get_device_name(0))"
    asked = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if asked.returncode != 0:
        print(f"GPU tests: torch finds no device: {asked.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    count, _, name = asked.stdout.strip().partition(" ")
    reason = obstacle(int(count))
    if reason is not None:
        print(f"GPU tests: {reason}", file=sys.stderr)
        return None
    return name


def _step(report: Report, stage: str, step: Step, args: argparse.Namespace) -> str:
    """Run one step and enter it; returns its result."""
    title = f"[stage {stage}] {step.name}: {step.what}"
    if report.passed(step.name) and not args.again:
        print(f"{title}: passed before", flush=True)
        return "passed"
    limit_s = step.limit_s * (REHEARSAL_FACTOR if args.cpu_rehearsal else 1)
    print(f"{title} (at most {limit_s} s)", flush=True)
    rows = report.rows_file(step.name)
    if args.again:
        rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "tests.gpu.rows"]
    command += [f"--gpu-rows={rows.resolve()}", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts="]
    command += [f"--rootdir={ROOT}", "-c", os.devnull, *(str(ROOT / test) for test in step.tests)]
    scratch = args.out / f"{step.name}.tmp"
    command.append(f"--basetemp={scratch.resolve()}")
    start = time.monotonic()
    ended = run(
        command,
        limit_s,
        args.out / f"{step.name}.log",
        env=environment(args.cpu_rehearsal),
        cwd=ROOT,
        show=lambda text: print(text, end="", flush=True),
    )
    shutil.rmtree(scratch, ignore_errors=True)
    again = f"bash gpu_bundle/run.sh {stage}" if stage != "gpus" else "make test-gpu"
    command_line = f"{again}{' --cpu-rehearsal' if args.cpu_rehearsal else ''}"
    entry = report.add(stage, step, ended.status, time.monotonic() - start, command_line)
    print(f"{title}: {entry['result']} after {entry['seconds']} s {entry['counts']}", flush=True)
    return str(entry["result"])


def environment(rehearsal: bool) -> dict[str, str]:
    """Of a step's process: what it runs on (tests/conftest.py reads it)."""
    env = {**os.environ, "DSV3_TEST_DEVICE": "rehearsal" if rehearsal else "gpu", "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env.setdefault("OMP_NUM_THREADS", "1")
    if rehearsal:
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # pairs and messages overlap
    return env


if __name__ == "__main__":
    sys.exit(main())
