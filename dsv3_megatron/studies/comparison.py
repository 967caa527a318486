"""Losses of a study's runs against those of one of them: relative error of smoothed losses, table, picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.demo.results import Curve
from dsv3_megatron.studies.demo_runs import DECAY, smoothed


def relative_errors(curve: Curve, baseline: Curve) -> Curve:
    """|a − b| / b of the smoothed losses, step by step.

    Raises:
        LookupError: the curves do not have the same steps.
    """
    if curve.keys() != baseline.keys():
        raise LookupError("the runs have other steps than the baseline: train them to the same --iterations")
    a, b = smoothed(curve), smoothed(baseline)
    return {step: abs(a[step] - b[step]) / b[step] for step in sorted(b)}


def compare(curves: Mapping[str, Curve], baseline: str, target: float, warmup: int) -> dict[str, Any]:
    """Figures of every run after the first `warmup` steps.

    Args:
        curves: loss by step of each run.
        baseline: the run that the others are compared with.
        target: relative error that is hoped for.

    Returns:
        {"steps", "warmup", "baseline", "target", "runs": {name: {"loss": smoothed loss at the end, and except for the
        baseline "max_error", "mean_error", "last_error": relative, "steps_above_target": share}}}

    Raises:
        LookupError: the baseline is missing, or see `relative_errors`.
    """
    if baseline not in curves:
        raise LookupError(f"the run {baseline} has not come to its end: train it first")
    runs: dict[str, dict[str, float]] = {}
    for name, curve in curves.items():
        runs[name] = {"loss": smoothed(curve)[max(curve)]}
        if name == baseline:
            continue
        by_step = relative_errors(curve, curves[baseline])
        errors = [error for step, error in by_step.items() if step > warmup]
        runs[name] |= {
            "max_error": max(errors),
            "mean_error": sum(errors) / len(errors),
            "last_error": errors[-1],
            "steps_above_target": sum(error > target for error in errors) / len(errors),
        }
    steps = max(curves[baseline])
    return {"steps": steps, "warmup": warmup, "baseline": baseline, "target": target, "runs": runs}


def table(result: Mapping[str, Any]) -> str:
    """The comparison for people, as Markdown."""
    lines = [
        f"| run | loss at step {result['steps']} | largest error | mean | at the end | steps above "
        f"{result['target']:.2%} |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in result["runs"].items():
        errors = [
            f"{run[key]:.3%}" if key in run else "" for key in ("max_error", "mean_error", "last_error")
        ]
        share = f"{run['steps_above_target']:.1%}" if "steps_above_target" in run else ""
        lines.append(f"| {name} | {run['loss']:.4f} | {' | '.join(errors)} | {share} |")
    return "\n".join(lines)


def draw(curves: Mapping[str, Curve], result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: smoothed losses, and their relative errors against the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(10, 8), sharex=True)
    for name, curve in curves.items():
        steps = sorted(curve)
        loss = smoothed(curve)
        (line,) = top.plot(steps, [loss[step] for step in steps], label=name, linewidth=1)
        if name != result["baseline"]:
            errors = relative_errors(curve, curves[result["baseline"]])
            bottom.plot(
                steps, [100 * errors[s] for s in steps], label=name, linewidth=1, color=line.get_color()
            )
    top.set(ylabel="loss (nats per token)", title=f"Training loss, smoothed (EMA {DECAY})")
    top.legend(fontsize="small")
    label = f"target, {result['target']:.2%}"
    bottom.axhline(100 * result["target"], color="black", linestyle="--", linewidth=0.8, label=label)
    bottom.axvline(result["warmup"], color="grey", linewidth=0.8, label="end of the warm-up")
    bottom.set(
        xlabel="step", ylabel="relative error (%)", title=f"Against {result['baseline']}", ylim=(0, None)
    )
    bottom.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
