"""`dsv3 prove layout LAUNCH LINE`: the gradients of this layout are those of one process."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.prove.line import shrink
from dsv3_megatron.prove.measure import norm, number
from dsv3_megatron.prove.report import Check, Report
from dsv3_megatron.prove.runs import Recorded, RunFailed, gradients, run

__all__ = ["BOUND", "prove_layout"]

BOUND = 1e-5  # ‖a − b‖ / ‖b‖ of each gradient, fp32


def prove_layout(line: Sequence[str], spoil: str = "") -> Report:
    """One step of the shrunk line in its layout and in one process, fp32, from the same weights and samples.

    Args:
        line: the user's launch line.
        spoil: "gradient" changes one by 0.1% in the layout: the control.
    """
    small, single = shrink(line, precision=False), shrink(line, precision=False, single=True)
    report = Report(
        "layout",
        "The layout computes the gradients that one process computes.",
        not_covered=[
            "the size of the user's model, its data and its number of processes (see the settings)",
            "bf16 and FP8: both sides are fp32, so that a difference is the layout's",
            "the distributed optimizer: gradients are compared before the update, whole on every rank",
            "GPU kernels and NCCL: it ran on the CPU over gloo",
        ],
        settings={**small.settings(), "against": f"1 process: {' '.join(single.words)}"},
    )
    if small.world_size == 1:
        report.checks.append(Check("layout", "", "", None, detail="the shrunk line is one process already"))
        return report
    folder = Path(tempfile.mkdtemp(prefix="dsv3-prove-"))
    try:
        course = ["--train-iters", "1", "--lr-decay-iters", "1"]
        whole = run("one process", [*single.words, *course], 1, folder, gradients=True)
        split = run("layout", [*small.words, *course], small.world_size, folder, gradients=True, spoil=spoil)
        report.checks += [_losses(whole, split), _gradients(report, whole, split)]
    except RunFailed as error:
        # Without the one process there is nothing to compare the layout with.
        holds = False if (folder / "layout").exists() else None
        report.checks.append(Check("runs", "each run", "ends without an error", holds, detail=str(error)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _losses(whole: Recorded, split: Recorded) -> Check:
    a, b = whole.steps[0], split.steps[0]
    keys = sorted((a.keys() | b.keys()) - {"skipped"})
    offs = {key: number(a.get(key), b.get(key)) for key in keys}
    worst = max(offs, key=lambda key: offs[key])
    return Check(
        "losses",
        f"{', '.join(keys)} of the first step",
        f"relative difference at most {BOUND:g}",
        offs[worst] <= BOUND and whole.finite() and split.finite(),
        len(keys),
        offs[worst],
        "" if offs[worst] <= BOUND else f"{worst}: {a.get(worst)!r} and {b.get(worst)!r}",
    )


def _gradients(report: Report, whole: Recorded, split: Recorded) -> Check:
    compared, how = (
        "the gradient of every parameter by its global name",
        f"‖a − b‖ / ‖b‖ at most {BOUND:g}, fp32",
    )
    ours, copies = gradients(split.folder)
    theirs, _ = gradients(whole.folder)
    odd = sorted(ours.keys() ^ theirs.keys())
    if odd:
        return Check("gradients", compared, how, False, len(theirs), detail=f"on one side only: {odd[:3]}")
    rows: list[dict[str, Any]] = []
    for name, b in theirs.items():
        rows.append({"name": name, "norm": float(b.double().norm()), "off": norm(ours[name], b)})
    rows.sort(key=lambda row: -row["off"])
    report.tables["gradients"] = rows
    if all(row["norm"] == 0 for row in rows):
        return Check("gradients", compared, how, False, len(rows), detail="all gradients are zero")
    zero = sum(row["norm"] == 0 for row in rows)
    worst = rows[0]
    return Check(
        "gradients",
        f"{compared}; {copies} copies on several ranks equal each other",
        how,
        worst["off"] <= BOUND,
        len(rows),
        worst["off"],
        f"largest: {worst['name']}"
        + (f"; {zero} are zero on both sides (experts without tokens)" if zero else ""),
    )
