"""Pictures of a timeline: the layout of the DualPipe figure in the DeepSeek-V3 report, and text for a
terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from .actions import Action, Kind
from .simulate import Event

_LABELS = {
    Kind.F: "Forward",
    Kind.B: "Backward",
    Kind.B_INPUT: "Backward for input",
    Kind.W: "Backward for weights",
    Kind.PAIR: "Overlapped forward & backward",
}
# Light and dark shade, see `_shade`.
_FILL = {
    Kind.F: ("#f9d67a", "#e0a33c"),
    Kind.B: ("#a9d18e", "#6fa653"),
    Kind.B_INPUT: ("#a8d5e5", "#62a9c2"),
    Kind.W: ("#7a9cd6", "#4a6fb0"),
}
_ANSI = {Kind.F: (179, 172), Kind.B: (71, 65), Kind.B_INPUT: (74, 67), Kind.W: (61, 60)}


def _shares(event: Event) -> Iterator[tuple[Action, float, float]]:
    """Each single computation of an event with its start and length; a pair is split 1 : 2 for drawing."""
    length = event.end - event.start
    if event.action.backward is None:
        yield event.action, event.start, length
        return
    forward, backward = event.action.parts
    yield forward, event.start, length / 3
    yield backward, event.start + length / 3, length * 2 / 3


def _shade(part: Action, num_ranks: int) -> int:
    """0 or 1: tells the two streams of a rank apart, be they two directions or two stages of one
    direction."""
    return (part.direction + part.stage // num_ranks) % 2


def _cell(events: Sequence[Event]) -> float:
    """The time that one cell stands for: the shortest action, but not so short that a timeline grows
    endless."""
    makespan = max(event.end for event in events)
    shortest = min(
        (length for event in events for _, _, length in _shares(event) if length > 0), default=makespan
    )
    return max(shortest, makespan / 400)


def draw(
    events: Sequence[Event],
    title: str,
    paths: Sequence[Path],
    unit: str = "units of one forward",
    inches: float | None = None,
) -> None:
    """Draw a timeline to files; the suffix of each path gives its format (svg, png, pdf).

    Args:
        events: simulated or measured.
        title: above the picture.
        unit: of the times, for the axis.
        inches: width; by default the shortest action has room for its number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    num_ranks = 1 + max(event.rank for event in events)
    makespan = max(event.end for event in events)
    if inches is None:
        inches = min(max(10.0, 0.24 * makespan / _cell(events)), 48.0)  # two digits fit into a cell
    row = 0.36
    figure = Figure(figsize=(inches, row * num_ranks + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    column = (inches - 1.0) * 72 / makespan  # points per time unit
    for event in events:
        for part, start, length in _shares(event):
            fill = _FILL[part.kind][_shade(part, num_ranks)]
            axes.add_patch(
                Rectangle((start, event.rank), length, 1, facecolor=fill, edgecolor="white", lw=0.5)
            )
            number = str(part.microbatch)
            if length * column > 5 * len(number):
                x, y = start + length / 2, event.rank + 0.53
                ink = "white" if part.kind is Kind.W and _shade(part, num_ranks) else "black"
                axes.text(x, y, number, ha="center", va="center", fontsize=7.5, color=ink)
    for event in events:  # borders over the fills of the neighbours
        if event.action.kind is Kind.PAIR:
            size = (event.end - event.start, 1)
            axes.add_patch(Rectangle((event.start, event.rank), *size, fill=False, edgecolor="black", lw=1.2))

    axes.set_xlim(0, makespan)
    axes.set_ylim(num_ranks, 0)
    axes.set_yticks(
        [rank + 0.5 for rank in range(num_ranks)], [f"Device {rank}" for rank in range(num_ranks)]
    )
    axes.set_facecolor("#f2f2f2")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(f"Time ({unit})")
    axes.set_title(title, loc="left", fontsize=11)
    present = {part.kind for event in events for part in event.action.parts}
    handles = [Patch(facecolor=_FILL[kind][0], label=_LABELS[kind]) for kind in _FILL if kind in present]
    parts = [part for event in events for part in event.action.parts]
    if any(part.direction for part in parts):
        handles.append(Patch(facecolor="#8a8a8a", label="Darker: second direction"))
    elif any(_shade(part, num_ranks) for part in parts):
        handles.append(Patch(facecolor="#8a8a8a", label="Darker: second stage of the rank"))
    if any(event.action.kind is Kind.PAIR for event in events):
        handles.append(Patch(facecolor="white", edgecolor="black", label=_LABELS[Kind.PAIR]))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    for path in paths:
        figure.savefig(path, dpi=160)


def text(events: Sequence[Event], colour: bool = False) -> str:
    """A timeline for the terminal: one line per rank, one cell for the length of the shortest action.

    Without colour the letter tells the kind (F, B, I = backward for input, W), in lower case what a
    picture shows darker (second direction, or second stage of a rank); `[` and `]` enclose an overlapped
    pair.
    """
    num_ranks = 1 + max(event.rank for event in events)
    cell_length = _cell(events)
    digits = len(str(max(part.microbatch for event in events for part in event.action.parts)))
    width = digits + (1 if colour else 3)

    lines = [f"{rank:>3} " for rank in range(num_ranks)]
    filled = [0] * num_ranks
    for event in sorted(events, key=lambda event: event.start):
        for part, start, length in _shares(event):
            first, last = (round(time / cell_length * width) for time in (start, start + length))
            lines[event.rank] += " " * (first - filled[event.rank])
            filled[event.rank] = last
            if colour:
                cell = f"{part.microbatch:>{digits}}".ljust(last - first)[: last - first]
                cell = f"\x1b[48;5;{_ANSI[part.kind][_shade(part, num_ranks)]}m\x1b[97m{cell}\x1b[0m"
            else:
                cell = _plain_cell(event.action, part, last - first, bool(_shade(part, num_ranks)))
            lines[event.rank] += cell
    return "\n".join(lines)


def _plain_cell(action: Action, part: Action, width: int, lower: bool) -> str:
    letter = part.kind.value.lower() if lower else part.kind.value
    opening = "[" if action.kind is Kind.PAIR and part.kind is Kind.F else " "
    closing = "]" if action.kind is Kind.PAIR and part.kind is Kind.B else " "
    body = f"{letter}{part.microbatch}"
    body = body.ljust(width - 2, "-" if part.kind is Kind.B else " ")[: max(width - 2, 0)]
    return f"{opening}{body}{closing}"[:width]
