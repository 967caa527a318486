"""Pictures of results: needles by length and depth, accuracy by stated confidence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_calibration", "draw_needles"]


def draw_needles(
    lengths: Sequence[int], depths: Sequence[int], table: Sequence[Sequence[float]], file: Path
) -> None:
    """The share of needles found, `table[depth][length]`, as a map."""
    figure, axes = _figure(max(4.0, 1 + 0.9 * len(lengths)), max(3.0, 1.2 + 0.5 * len(depths)))
    axes.imshow(table, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the needle")
    for row, shares in enumerate(table):
        for column, share in enumerate(shares):
            axes.text(column, row, f"{share:.0%}" if share == share else "", ha="center", va="center")
    _save(figure, file)


def draw_calibration(table: Sequence[dict[str, float]], file: Path) -> None:
    """Accuracy against stated confidence; on the line both are equal."""
    figure, axes = _figure(4.5, 4.0)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    axes.plot([row["confidence"] for row in table], [row["accuracy"] for row in table], marker="o")
    for row in table:
        axes.annotate(
            f"{row['num']:.0f}", (row["confidence"], row["accuracy"]), (4, 4), textcoords="offset points"
        )
    axes.set(xlim=(0, 1.03), ylim=(-0.03, 1.03), xlabel="stated confidence", ylabel="correct")
    _save(figure, file)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
