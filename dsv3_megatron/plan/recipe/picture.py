"""The picture of a recipe's schedules."""

from pathlib import Path
from typing import Any

PANELS = (
    ("lr", "learning rate"),
    ("batch", "batch (sequences)"),
    ("gamma", "bias update rate γ"),
    ("mtp_weight", "MTP weight λ"),
)
POINTS = 2000


def draw(schedules: Any, title: str, path: Path) -> None:
    """Write a PNG with learning rate, batch, γ and λ over the tokens; borders are dotted.

    `schedules` has `seq_length`, `borders()` and `at(tokens)`, like `schedules.Schedules`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    borders = [samples * schedules.seq_length for samples in schedules.borders().values()]
    end = borders[-1]
    # Both sides of each border, so that a jump is drawn upright.
    beside = [tokens + shift for tokens in borders for shift in (-schedules.seq_length, 0)]
    tokens = sorted({*(end * i // POINTS for i in range(POINTS + 1)), *(t for t in beside if 0 <= t <= end)})
    values = [schedules.at(count) for count in tokens]
    unit, suffix = (1e12, "T") if end >= 1e12 else (1e9, "B") if end >= 1e9 else (1e6, "M")
    figure, axes = pyplot.subplots(4, 1, figsize=(9, 8), sharex=True)
    for axis, (name, label) in zip(axes, PANELS, strict=True):
        axis.plot([count / unit for count in tokens], [value[name] for value in values])
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        for border in borders[1:-1]:
            axis.axvline(border / unit, color="grey", linestyle=":", linewidth=0.8)
    axes[0].set_title(title)
    axes[-1].set_xlabel(f"tokens ({suffix})")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
