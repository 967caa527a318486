"""Losses of the study's runs against those of BF16: relative error of smoothed losses, table, picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.demo.results import Curve
from dsv3_megatron.demo.study import DECAY, smoothed

BASELINE = "bf16"
TARGET = 0.0025  # the report's claim (R§3.3)


def relative_errors(curve: Curve, baseline: Curve) -> Curve:
    """|a − b| / b of the smoothed losses, step by step.

    Raises:
        LookupError: the curves do not have the same steps.
    """
    if curve.keys() != baseline.keys():
        raise LookupError("the runs have other steps than the BF16 run: train them to the same --iterations")
    a, b = smoothed(curve), smoothed(baseline)
    return {step: abs(a[step] - b[step]) / b[step] for step in sorted(b)}


def compare(curves: Mapping[str, Curve], warmup: int) -> dict[str, Any]:
    """Figures of every run after the first `warmup` steps.

    Returns:
        {"steps", "warmup", "target", "runs": {name: {"loss": smoothed loss at the end, and except for BF16
        "max_error", "mean_error", "last_error": relative, "steps_above_target": share}}}

    Raises:
        LookupError: there is no BF16 run, or see `relative_errors`.
    """
    if BASELINE not in curves:
        raise LookupError(f"the run {BASELINE} has not come to its end: train it first")
    baseline = curves[BASELINE]
    runs: dict[str, dict[str, float]] = {}
    for name, curve in curves.items():
        runs[name] = {"loss": smoothed(curve)[max(curve)]}
        if name == BASELINE:
            continue
        errors = [error for step, error in relative_errors(curve, baseline).items() if step > warmup]
        runs[name] |= {
            "max_error": max(errors),
            "mean_error": sum(errors) / len(errors),
            "last_error": errors[-1],
            "steps_above_target": sum(error > TARGET for error in errors) / len(errors),
        }
    return {"steps": max(baseline), "warmup": warmup, "target": TARGET, "runs": runs}


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
    """Write a PNG: smoothed losses, and their relative errors against BF16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(10, 8), sharex=True)
    for name, curve in curves.items():
        steps = sorted(curve)
        loss = smoothed(curve)
        (line,) = top.plot(steps, [loss[step] for step in steps], label=name, linewidth=1)
        if name != BASELINE:
            errors = relative_errors(curve, curves[BASELINE])
            bottom.plot(
                steps, [100 * errors[s] for s in steps], label=name, linewidth=1, color=line.get_color()
            )
    top.set(ylabel="loss (nats per token)", title=f"Training loss, smoothed (EMA {DECAY})")
    top.legend(fontsize="small")
    bottom.axhline(
        100 * result["target"], color="black", linestyle="--", linewidth=0.8, label="0.25 % (report)"
    )
    bottom.axvline(result["warmup"], color="grey", linewidth=0.8, label="end of the warm-up")
    bottom.set(
        xlabel="step", ylabel="relative error (%)", title="Against BF16", ylim=(0, None), yscale="linear"
    )
    bottom.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
