"""Pictures of a plan: the predicted timeline, memory by part and over time, and a measured timeline beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.pipeline.picture import draw
from dsv3_megatron.pipeline.simulate import Event
from dsv3_megatron.pipeline.trace import read_trace, write_trace
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.memory import GIB
from dsv3_megatron.plan.step import Plan

_FILES = tuple(
    f"{name}{suffix}" for name in ("timeline", "memory", "memory_over_time") for suffix in (".svg", ".png")
)
_FILES += ("timeline.json",)
_OVERLAY = ("overlay.json", "overlay.png", "overlay.svg")


def make_place(folder: Path, measured: Path | None = None) -> None:
    """The folder; PlanError where it cannot be made, or one of its files not written. Each is opened to see it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(
            f"pictures={folder}: no folder can be made there ({error.strerror}); use another place"
        ) from error
    for name in _FILES + (_OVERLAY if measured is not None else ()):
        file = folder / name
        existed = file.exists()
        try:
            if existed and not file.is_file():
                raise PlanError(f"pictures={folder}: {name} is there and is no file; use another place")
            with file.open("ab"):
                pass
            if not existed:
                file.unlink()
        except OSError as error:
            raise _unwritten(folder, error) from error


def _unwritten(folder: Path, error: OSError) -> PlanError:
    return PlanError(
        f"pictures={folder}: cannot be written to ({error.strerror or error}); use another place"
    )


def write_all(plan: Plan, folder: Path, measured: Path | None = None) -> list[str]:
    """Every picture into `folder`; returns what was written, and the error against `measured` if given.

    Errors: PlanError where they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write_all(plan, folder, measured)
    except OSError as error:  # a full disk
        raise _unwritten(folder, error) from error


def _write_all(plan: Plan, folder: Path, measured: Path | None) -> list[str]:
    events = plan.simulation.events
    title = (
        f"{plan.job.layout.schedule} on {plan.job.layout.pp} pipeline ranks, predicted: {plan.step_s:.2f} s"
    )
    timeline = [folder / f"timeline{suffix}" for suffix in (".svg", ".png")]
    draw(events, title, timeline, "seconds", inches=24.0)
    write_trace(folder / "timeline.json", {"predicted": events}, microseconds_per_unit=1e6)
    draw_memory(plan, [folder / f"memory{suffix}" for suffix in (".svg", ".png")])
    draw_memory_over_time(plan, [folder / f"memory_over_time{suffix}" for suffix in (".svg", ".png")])
    lines = [f"wrote timeline, memory and memory_over_time (.svg, .png) and timeline.json to {folder}"]
    if measured is not None:
        lines.append(lay_over(events, measured, folder))
    return lines


def memory_over_time(plan: Plan) -> list[list[tuple[float, float]]]:
    """Per rank, (seconds, GiB) from the start of the step: the peak of each action while it runs, then what is left."""
    by_rank: list[list[Event]] = [[] for _ in plan.memory]
    for event in plan.simulation.events:
        by_rank[event.rank].append(event)
    curves = []
    for events, memory in zip(by_rank, plan.memory, strict=True):
        curve = [(0.0, memory.resident / GIB)]
        for event, moment in zip(events, memory.moments, strict=True):
            curve.append((event.start, (memory.resident + moment.peak) / GIB))
            curve.append((event.end, (memory.resident + moment.live) / GIB))
        curves.append(curve)
    return curves


def draw_memory(plan: Plan, paths: Sequence[Path]) -> None:
    """Stacked bars, one per pipeline rank, and the limit."""
    figure, axes = _canvas(10, 4.5)
    names = list(dict.fromkeys(name for rank in plan.memory for name in rank.parts))
    bottom = [0.0] * len(plan.memory)
    for name in names:
        sizes = [rank.parts.get(name, 0) / GIB for rank in plan.memory]
        if max(sizes) < 0.05:
            continue
        axes.bar(range(len(sizes)), sizes, bottom=bottom, label=name, width=0.8)
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    axes.axhline(plan.gpu.memory / GIB, color="black", lw=1, ls="--", label=f"{plan.gpu.name}'s memory")
    axes.set_xlabel("pipeline rank")
    axes.set_ylabel("GiB at the peak")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, paths)


def draw_memory_over_time(plan: Plan, paths: Sequence[Path]) -> None:
    """One line per pipeline rank."""
    from matplotlib import colormaps

    figure, axes = _canvas(12, 4.5)
    colours = colormaps["viridis"].resampled(max(2, len(plan.memory)))
    for rank, curve in enumerate(memory_over_time(plan)):
        axes.plot(*zip(*curve, strict=True), lw=0.6, color=colours(rank), label=f"rank {rank}")
    axes.axhline(plan.gpu.memory / GIB, color="black", lw=1, ls="--")
    axes.set_xlabel("seconds from the start of the step")
    axes.set_ylabel("GiB")
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    _save(figure, paths)


def lay_over(predicted: Sequence[Event], measured_file: Path, folder: Path) -> str:
    """`overlay.png`, `.svg` and a trace with both timelines; returns the errors in words.

    Both begin at 0. The measured file is one that `--profile-pipeline` wrote (`pipeline.trace`).

    Errors: PlanError when the file is no such trace, or of another number of pipeline ranks.
    """
    try:
        measured = read_trace(measured_file)["measured"]
    except (OSError, KeyError, ValueError) as error:
        raise PlanError(
            f"measured={measured_file}: not a timeline of --profile-pipeline ({type(error).__name__}: {error})"
        ) from error
    ranks = {1 + max(event.rank for event in events) for events in (predicted, measured)}
    if len(ranks) > 1:
        raise PlanError(
            f"measured={measured_file}: its pipeline has {1 + max(e.rank for e in measured)} ranks, the planned one "
            f"{1 + max(e.rank for e in predicted)}: plan the layout that was measured"
        )
    write_trace(
        folder / "overlay.json", {"measured": measured, "predicted": predicted}, microseconds_per_unit=1e6
    )
    figure, axes = _canvas(16, 0.5 * ranks.pop() + 1.5)
    for events, offset, colour, name in (
        (measured, 0.1, "#4a6fb0", "measured"),
        (predicted, 0.5, "#e0a33c", "predicted"),
    ):
        for rank in sorted({event.rank for event in events}):
            bars = [(event.start, event.end - event.start) for event in events if event.rank == rank]
            axes.broken_barh(
                bars, (rank + offset, 0.38), facecolors=colour, edgecolor="white", lw=0.3,
                label=name if rank == 0 else None,
            )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_ylabel("pipeline rank")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, [folder / "overlay.png", folder / "overlay.svg"])
    return errors_in_words(predicted, measured)


def errors_in_words(predicted: Sequence[Event], measured: Sequence[Event]) -> str:
    """The error of the whole step, and of the mean length of each kind of action."""
    whole = max(event.end for event in predicted) / max(event.end for event in measured) - 1
    parts = []
    for kind in dict.fromkeys(event.action.kind for event in measured):
        means = [
            _mean([e.end - e.start for e in events if e.action.kind is kind])
            for events in (predicted, measured)
        ]
        if all(means):
            parts.append(f"{kind.value} {means[0] / means[1] - 1:+.1%}")
    return f"predicted against measured: step {whole:+.1%}; mean action: {', '.join(parts)}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, paths: Sequence[Path]) -> None:
    for path in paths:
        figure.savefig(path, dpi=130)
