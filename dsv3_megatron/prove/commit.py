"""`dsv3 prove commit OLD NEW [LAUNCH LINE]`: do two versions, of Megatron or of this package, train alike?

A version is what pip installs: `megatron-core==0.19.1`, a wheel, a folder, `git+https://…@commit`. Each is installed
alone (--no-deps) into a folder of its own that comes first on the path; everything else is this environment's.
"here" is this environment as it is.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.prove.line import shrink
from dsv3_megatron.prove.measure import number
from dsv3_megatron.prove.report import Check, Report
from dsv3_megatron.prove.runs import Recorded, RunFailed, run

__all__ = ["BOUND", "HERE", "LINE", "prove_commit"]

HERE = "here"
BOUND = 1e-5  # relative, of each loss and norm
# Megatron would end the run at the first one; here the gate is to say where it was.
NAN_IS_SEEN = ("--no-check-for-nan-in-loss-and-grad",)
LINE = (
    "--spec", "dsv3", "--mtp-num-layers", "1", "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer",
)  # fmt: skip


def prove_commit(
    old: str, new: str, line: Sequence[str], steps: int = 5, bound: float = BOUND, spoil: Sequence[str] = ()
) -> Report:
    """Train the shrunk line with both versions and compare step by step.

    Args:
        old, new: what pip installs, or "here".
        line: launch line; empty for `LINE`.
        spoil: words that only the new version gets: the control.

    Raises:
        RefusedArgument: pip cannot install a version.
    """
    small = shrink(list(line) or list(LINE))
    report = Report(
        "commit",
        "Both versions compute the same losses and gradient norms, and nothing that is not a number.",
        not_covered=[
            "the size of the user's model, its data and its number of processes (see the settings)",
            "GPU kernels and NCCL: it ran on the CPU over gloo",
            f"more than {steps} steps; speed and memory; checkpoints of one version read by the other",
            "dependencies: only the package itself was replaced, all others are this environment's",
        ],
        settings={"old": old, "new": new, "steps": steps, "bound": bound, **small.settings()},
    )
    folder = Path(tempfile.mkdtemp(prefix="dsv3-prove-"))
    try:
        runs: dict[str, Recorded] = {}
        versions = {"old": old, "new": new}
        paths: dict[str, Path | None] = {}
        for side, version in versions.items():  # what pip does not have is known before anything is trained
            paths[side], report.settings[f"{side} installed"] = _installed(side, version, folder)
        for side, version in versions.items():
            course = ["--train-iters", str(steps), "--lr-decay-iters", str(steps), "--lr-warmup-iters", "0"]
            seen = () if "--on-bad-step" in small.words else NAN_IS_SEEN
            words = [*small.words, *course, *seen, *(spoil if side == "new" else ())]
            try:
                runs[side] = run(
                    f"{side} version", words, small.world_size, folder, first_on_path=paths[side]
                )
            except RunFailed as error:
                # Without the old one nothing is said of the new one; a new one that stops is no good.
                holds = None if side == "old" else False
                report.checks.append(
                    Check(f"{side} runs", version, "ends without an error", holds, detail=str(error))
                )
        if len(runs) == 2:
            installed = [(side, found) for side, found in runs.items() if report.settings[side] != HERE]
            report.checks += [_used(side, found, report) for side, found in installed]
            report.checks += [_finite(runs), _alike(runs["old"], runs["new"], steps, bound, report)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _installed(side: str, version: str, folder: Path) -> tuple[Path | None, str]:
    """Where a version was installed, and what pip calls it."""
    if version == HERE:
        return None, "this environment"
    target = folder / f"site-{side}"
    print(f"prove: {side}: pip install {version} …", file=sys.stderr, flush=True)
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    # pip takes a folder's bare name for a package of that name somewhere else.
    source = str(Path(version).resolve()) if Path(version).is_dir() else version
    done = subprocess.run([*words, "--target", str(target), source], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
        raise RefusedArgument(
            f"{side.upper()} {version}: pip cannot install it: {(lines or ['no reason given'])[0]}"
        )
    found = ", ".join(sorted(map(_named, target.glob("*.dist-info"))))
    if not found:
        raise RefusedArgument(f"{side.upper()} {version!r}: pip installed nothing for it")
    return target, found


def _named(info: Path) -> str:
    """Name and version of what pip installed, with the commit where it came from git."""
    try:
        commit = json.loads((info / "direct_url.json").read_text())["vcs_info"]["commit_id"]
    except (OSError, ValueError, KeyError):
        commit = ""
    return info.name.removesuffix(".dist-info") + (f" of commit {commit[:12]}" if commit else "")


def _used(side: str, found: Recorded, report: Report) -> Check:
    """A version of something that no training imports would agree with any other."""
    return Check(
        f"{side} version is what ran",
        f"modules of the {side} run",
        "some came from the folder in which pip put it",
        bool(found.loaded) or None,
        len(found.loaded),
        None,
        ", ".join(found.loaded)
        or f"{report.settings[f'{side} installed']}: the training imports nothing of it",
    )


def _finite(runs: dict[str, Recorded]) -> Check:
    bad = []
    for side, found in runs.items():
        for step, row in enumerate(found.steps, 1):
            wrong = [f"{name} {value!r}" for name, value in row.items() if value and not math.isfinite(value)]
            wrong += ["skipped"] if row["skipped"] else []
            bad += [f"{side}, step {step}: {', '.join(wrong)}"] if wrong else []
    return Check(
        "NaN gate",
        "losses and gradient norms of both versions",
        "finite at every step, no step skipped",
        not bad,
        sum(len(found.steps) for found in runs.values()),
        None,
        "; ".join(bad[:3]),
    )


def _alike(old: Recorded, new: Recorded, steps: int, bound: float, report: Report) -> Check:
    rows: list[dict[str, Any]] = []
    worst, where = 0.0, ""
    for step, (a, b) in enumerate(zip(old.steps, new.steps, strict=False), 1):
        for name in sorted(a.keys() | b.keys()):
            off = number(a.get(name), b.get(name))
            rows.append({"step": step, "name": name, "old": a.get(name), "new": b.get(name), "off": off})
            if off > worst:
                worst = off
                where = f"largest at step {step}: {name} {a.get(name)!r} and {b.get(name)!r}"
    report.tables["steps"] = rows
    identical = sum(row["off"] == 0 for row in rows)
    whole = len(old.steps) == len(new.steps) == steps
    return Check(
        "losses and norms",
        "each loss and the gradient norm of each step",
        f"relative difference at most {bound:g}",
        whole and worst <= bound and math.isfinite(worst),
        len(rows),
        worst,
        where if worst else f"{identical} of {len(rows)} are equal bit for bit",
    )
