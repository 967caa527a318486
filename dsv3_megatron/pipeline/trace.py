"""Timelines as Chrome traces (JSON), for chrome://tracing or ui.perfetto.dev, and back.

Simulated and measured timelines share the format, so one file can hold both, each as a process of its own.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .actions import Action, Kind
from .simulate import Event

_COLOURS = {  # Chrome's reserved names; Perfetto picks its own by name
    Kind.F: "good",
    Kind.B: "bad",
    Kind.B_INPUT: "terrible",
    Kind.W: "grey",
    Kind.PAIR: "thread_state_running",
}


def chrome_trace(timelines: Mapping[str, Iterable[Event]], microseconds_per_unit: float = 1000.0) -> dict:
    """A trace object with one process per timeline and one thread per rank.

    Args:
        timelines: name to events, e.g. {"simulated": simulation.events, "measured": measured_events}.
        microseconds_per_unit: length of one time unit; 1e6 for timelines in seconds.
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
    return {"traceEvents": records, "displayTimeUnit": "ms", "microsecondsPerUnit": microseconds_per_unit}


def write_trace(
    path: Path, timelines: Mapping[str, Iterable[Event]], microseconds_per_unit: float = 1000.0
) -> None:
    """Write `chrome_trace(...)` as JSON."""
    path.write_text(json.dumps(chrome_trace(timelines, microseconds_per_unit)) + "\n")


def read_trace(path: Path) -> dict[str, tuple[Event, ...]]:
    """The timelines of a file that `write_trace` wrote, in their own time unit."""
    trace = json.loads(path.read_text())
    unit = trace["microsecondsPerUnit"]
    names: dict[int, str] = {}
    events: dict[int, list[Event]] = {}
    for record in trace["traceEvents"]:
        if record["name"] == "process_name":
            names[record["pid"]] = record["args"]["name"]
            events[record["pid"]] = []
        elif record["ph"] == "X":
            start, duration = record["ts"] / unit, record["dur"] / unit
            action = _from_args(record["args"])
            events[record["pid"]].append(Event(record["tid"], start, start + duration, action))
    return {names[pid]: tuple(events[pid]) for pid in names}


def _to_args(action: Action) -> dict:
    args = {key: getattr(action, key) for key in ("stage", "direction", "microbatch")} | {
        "kind": action.kind.value
    }
    return args if action.backward is None else args | {"backward": _to_args(action.backward)}


def _from_args(args: dict) -> Action:
    backward = _from_args(args["backward"]) if "backward" in args else None
    return Action(Kind(args["kind"]), args["stage"], args["direction"], args["microbatch"], backward)
