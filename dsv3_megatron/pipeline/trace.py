"""Timelines as Chrome traces (JSON), for chrome://tracing or ui.perfetto.dev, and back.

Simulated and measured timelines share the format, so one file can hold both, each as a process of its own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .actions import Action, Kind
from .simulate import Event

_SPAN = "span"  # category of records that are no actions
_COLOURS = {  # Chrome's reserved names; Perfetto picks its own by name
    Kind.F: "good",
    Kind.B: "bad",
    Kind.B_INPUT: "terrible",
    Kind.W: "grey",
    Kind.PAIR: "thread_state_running",
}


@dataclass(frozen=True, slots=True)
class Span:
    """What happened inside an action: a node of an overlapped pair, in one of the lanes of its rank."""

    rank: int
    lane: str
    name: str
    start: float
    end: float


def chrome_trace(
    timelines: Mapping[str, Iterable[Event]],
    microseconds_per_unit: float = 1000.0,
    spans: Sequence[Span] = (),
) -> dict:
    """A trace object with one process per timeline and one thread per rank.

    Args:
        timelines: name to events, e.g. {"simulated": simulation.events, "measured": measured_events}.
        microseconds_per_unit: length of one time unit; 1e6 for timelines in seconds.
        spans: shown as one more process, with a thread for each lane of a rank.
    """
    records: list[dict] = []
    for pid, (name, events) in enumerate(timelines.items()):
        records.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        ranks = set()
        for event in events:
            if event.rank not in ranks:
                ranks.add(event.rank)
                records.append(
                    {"ph": "M", "name": "thread_name", "pid": pid, "tid": event.rank}
                    | {"args": {"name": f"rank {event.rank}"}}
                )
            records.append(
                {
                    "ph": "X",
                    "name": str(event.action),
                    "cat": event.action.kind.value,
                    "cname": _COLOURS[event.action.kind],
                    "pid": pid,
                    "tid": event.rank,
                    "ts": event.start * microseconds_per_unit,
                    "dur": (event.end - event.start) * microseconds_per_unit,
                    "args": _to_args(event.action),
                }
            )
    records += _span_records(spans, len(timelines), microseconds_per_unit)
    return {"traceEvents": records, "displayTimeUnit": "ms", "microsecondsPerUnit": microseconds_per_unit}


def _span_records(spans: Sequence[Span], pid: int, microseconds_per_unit: float) -> list[dict]:
    if not spans:
        return []
    lanes = sorted({(span.rank, span.lane) for span in spans})
    records: list[dict] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": "inside the measured pairs"}}
    ]
    for tid, (rank, lane) in enumerate(lanes):
        name = {"name": f"rank {rank}: {lane}"}
        records.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": name})
    return records + [
        {
            "ph": "X",
            "name": span.name,
            "cat": _SPAN,
            "pid": pid,
            "tid": lanes.index((span.rank, span.lane)),
            "ts": span.start * microseconds_per_unit,
            "dur": (span.end - span.start) * microseconds_per_unit,
        }
        for span in spans
    ]


def write_trace(
    path: Path,
    timelines: Mapping[str, Iterable[Event]],
    microseconds_per_unit: float = 1000.0,
    spans: Sequence[Span] = (),
) -> None:
    """Write `chrome_trace(...)` as JSON."""
    path.write_text(json.dumps(chrome_trace(timelines, microseconds_per_unit, spans)) + "\n")


def read_trace(path: Path) -> dict[str, tuple[Event, ...]]:
    """The timelines of a file that `write_trace` wrote, in their own time unit; without its spans.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    try:
        return _timelines(json.loads(path.read_text()))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path} holds no timelines ({type(error).__name__}: {error}); use a trace that `dsv3 schedule` or "
            "--profile-pipeline wrote"
        ) from error


def _timelines(trace: dict) -> dict[str, tuple[Event, ...]]:
    unit = trace["microsecondsPerUnit"]
    names: dict[int, str] = {}
    events: dict[int, list[Event]] = {}
    for record in trace["traceEvents"]:
        if record["name"] == "process_name":
            names[record["pid"]] = record["args"]["name"]
            events[record["pid"]] = []
        elif record["ph"] == "X" and record["cat"] != _SPAN:
            start, duration = record["ts"] / unit, record["dur"] / unit
            action = _from_args(record["args"])
            events[record["pid"]].append(Event(record["tid"], start, start + duration, action))
    found = {names[pid]: tuple(own) for pid, own in events.items() if own}
    if not found:
        raise ValueError("no action in it")
    return found


def _to_args(action: Action) -> dict:
    args = {key: getattr(action, key) for key in ("stage", "direction", "microbatch")} | {
        "kind": action.kind.value
    }
    return args if action.backward is None else args | {"backward": _to_args(action.backward)}


def _from_args(args: dict) -> Action:
    backward = _from_args(args["backward"]) if "backward" in args else None
    return Action(Kind(args["kind"]), args["stage"], args["direction"], args["microbatch"], backward)
