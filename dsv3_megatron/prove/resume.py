"""`dsv3 prove resume LAUNCH LINE`: 2N steps are N steps, a checkpoint, and N steps more; also in another layout."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.prove.line import Shrunk, shrink
from dsv3_megatron.prove.measure import number
from dsv3_megatron.prove.report import Check, Report
from dsv3_megatron.prove.runs import Recorded, RunFailed, run

__all__ = ["prove_resume"]

ACROSS_BOUND = {"fp32": 1e-4, "bf16": 2e-2}


def prove_resume(
    line: Sequence[str], steps: int = 2, across: bool = True, spoil: Sequence[str] = ()
) -> Report:
    """Train 2 · `steps` steps twice, the second time stopped and resumed halfway.

    Args:
        line: the user's launch line.
        steps: N.
        across: resume in one process too.
        spoil: words added to the resumed run only: a control (`--no-load-optim`).
    """
    small = shrink(line)
    report = Report(
        "resume",
        f"A run of {2 * steps} steps is a run of {steps}, its checkpoint, and {steps} steps more.",
        not_covered=[
            "the size of the user's model, its data, its tokenizer and its number of processes (see the settings)",
            "GPU kernels, NCCL and the precision of a GPU: it ran on the CPU",
            "a run that was killed in the middle of writing (dsv3's resilience tests plant that)",
            f"more than {2 * steps} steps: schedules by tokens, ramps and decay ends",
        ],
        settings=small.settings(),
    )
    folder = Path(tempfile.mkdtemp(prefix="dsv3-prove-"))
    try:
        _compare(report, small, line, steps, across, list(spoil), folder)
    except RunFailed as error:
        # A line that does not run at all says nothing of resuming it.
        holds = False if (folder / "first-half").exists() else None
        report.checks.append(Check("runs", "each run", "ends without an error", holds, detail=str(error)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _compare(
    report: Report,
    small: Shrunk,
    line: Sequence[str],
    steps: int,
    across: bool,
    spoil: list[str],
    folder: Path,
) -> None:
    def words(name: str, of: Shrunk = small) -> list[str]:
        course = [
            "--train-iters",
            str(2 * steps),
            "--lr-decay-iters",
            str(2 * steps),
            "--lr-warmup-iters",
            "1",
        ]
        more = ["--dist-ckpt-optim-fully-reshardable"] if "--use-distributed-optimizer" in of.words else []
        return [*of.words, *course, *more, "--save", str(folder / name), "--save-interval", str(steps)]

    straight = run("uninterrupted", words("a"), small.world_size, folder)
    first = run("first half", [*words("b"), "--exit-interval", str(steps)], small.world_size, folder)
    if across:
        shutil.copytree(folder / "b", folder / "c")
    resumed = run("second half", [*words("b"), "--load", str(folder / "b"), *spoil], small.world_size, folder)
    report.checks.append(_losses(straight, first, resumed, steps))
    report.checks.append(_states(folder, 2 * steps))
    report.checks.append(_moved(folder, steps))
    if not across or small.world_size == 1:
        report.not_covered.append(
            "resuming in another layout: " + ("left out" if not across else "it is one process")
        )
        return
    if steps == 1:  # a step's loss and gradients come before its update
        report.not_covered.append("the optimizer's state in another layout: it shows from --steps 2 on")
    other = shrink(line, single=True)
    again = [*words("c", other), "--load", str(folder / "c"), "--no-load-rng", *spoil]
    there = run("second half in one process", again, 1, folder)
    report.checks.append(_across(straight, there, steps, "bf16" if "--bf16" in small.words else "fp32"))


def _losses(straight: Recorded, first: Recorded, resumed: Recorded, steps: int) -> Check:
    name, compared = "losses", f"losses and gradient norm of {2 * steps} steps, uninterrupted against resumed"
    how = "equal as floating-point numbers; none NaN, no step skipped"
    joined = first.steps + resumed.steps
    if len(straight.steps) != 2 * steps or len(joined) != 2 * steps:
        return Check(
            name, compared, how, False, detail=f"{len(straight.steps)} and {len(joined)} steps were made"
        )
    worst, where = 0.0, ""
    for step, (a, b) in enumerate(zip(straight.steps, joined, strict=True), 1):
        for key in sorted(a.keys() | b.keys()):
            off = number(a.get(key), b.get(key))
            if off > 0:
                worst = max(worst, off)
                where = where or f"first at step {step}: {key} {a.get(key)!r} and {b.get(key)!r}"
    finite = straight.finite() and resumed.finite()
    return Check(
        name, compared, how, worst == 0 and finite, len(joined), worst, where or ("" if finite else "NaN")
    )


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a torch_dist checkpoint by name: weights, biases, optimizer state, random states."""
    import numpy
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = dcp.FileSystemReader(checkpoint)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    found: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, f"{name}.{key}" if name else str(key))
        elif isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, numpy.ndarray | int) and "rng_state" in name:  # of NumPy and of Python
            found[name] = torch.as_tensor(numpy.asarray(value, dtype=numpy.int64))

    walk(state, "")
    return found


def _states(folder: Path, iteration: int) -> Check:
    import torch

    name = f"iter_{iteration:07d}"
    a, b = tensors(folder / "a" / name), tensors(folder / "b" / name)
    odd = sorted(a.keys() ^ b.keys())
    differ = [key for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])]
    detail = f"on one side only: {odd[:3]}" if odd else ""
    if differ:
        detail = f"{len(differ)} differ, for example {', '.join(sorted(differ)[:3])}"
    return Check(
        "state",
        "every tensor of the two final checkpoints: weights, router biases, optimizer state, random states",
        "equal bit for bit",
        not odd and not differ and bool(a),
        len(a),
        float(len(differ)),
        detail,
    )


def _moved(folder: Path, steps: int) -> Check:
    """The comparison would be empty if nothing had been trained after the checkpoint."""
    import torch

    half, whole = (tensors(folder / "a" / f"iter_{step:07d}") for step in (steps, 2 * steps))
    still = [key for key in half if not torch.equal(half[key], whole[key])]
    return Check(
        "training moved",
        "the same tensors after N and after 2N steps, uninterrupted",
        "weights and optimizer state changed (else equality would say nothing)",
        any("exp_avg" in key for key in still) and any("exp_avg" not in key for key in still),
        len(still),
    )


def _across(straight: Recorded, there: Recorded, steps: int, precision: str) -> Check:
    bound = ACROSS_BOUND[precision]
    worst = 0.0
    rows = list(zip(straight.steps[steps:], there.steps, strict=False))
    for a, b in rows:
        worst = max(worst, *(number(a.get(key), b.get(key)) for key in a.keys() | b.keys()))
    return Check(
        "another layout",
        "losses and gradient norm of the second half in the line's layout, and resumed in one process",
        f"relative difference at most {bound:g} ({precision})",
        len(rows) == steps and worst <= bound,
        len(rows),
        worst,
        "" if len(rows) == steps else f"{len(there.steps)} steps were made there",
    )
