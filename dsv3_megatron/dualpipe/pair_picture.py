"""The nodes of overlapped pairs as measured: what was computed while an all-to-all was under way."""

from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.pipeline.trace import Span

PAIRS = 2  # shown, of the rank whose first pair comes first
_FILL = {"F": "#f9d67a", "B": "#a9d18e", "W": "#7a9cd6"}  # as pipeline.picture


def draw_pairs(spans: Sequence[Span], title: str, path: Path) -> None:
    """Draw two lanes per rank, compute and communication, over the time of the first pairs.

    Args:
        spans: of all ranks; the first letter of a name is F, B or W. Times in seconds.
        title: above the picture.
        path: its suffix gives the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = sorted({span.rank for span in spans})
    lanes = [(rank, lane) for rank in ranks for lane in ("compute", "communication")]
    start, end = _window(spans)
    figure = Figure(figsize=(16, 0.55 * len(lanes) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for span in spans:
        left, right = max(span.start, start), min(span.end, end)
        if left >= right:
            continue
        row = lanes.index((span.rank, span.lane))
        axes.barh(
            row, right - left, left=left, height=0.9, color=_FILL[span.name[0]], edgecolor="white", lw=0.5
        )
        if (right - left) / (end - start) > 0.012 * len(span.name) ** 0.5:
            axes.text(
                (left + right) / 2, row, span.name[2:], ha="center", va="center", fontsize=6.5, clip_on=True
            )
    axes.set_yticks(range(len(lanes)), [f"Device {rank}: {lane}" for rank, lane in lanes])
    axes.set_xlim(start, end)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlabel("Time (seconds)")
    axes.set_title(title, loc="left", fontsize=11)
    labels = {"F": "Forward", "B": "Backward for input", "W": "Backward for weights"}
    handles = [Patch(facecolor=_FILL[key], label=label) for key, label in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _window(spans: Sequence[Span]) -> tuple[float, float]:
    """From the start of the first pair to the end of the `PAIRS`-th of the same rank."""
    first = min(spans, key=lambda span: span.start)
    mine = sorted((span for span in spans if span.rank == first.rank), key=lambda span: span.start)
    # A pair begins with the first computing node of layer 0's forward.
    begins = [span.start for span in mine if span.name == "F attention 0"]
    later = [begin for begin in begins if begin > first.start]
    end = later[PAIRS] if len(later) > PAIRS else max(span.end for span in mine)
    return first.start, end
