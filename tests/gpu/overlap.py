"""How much of the communication lies under computing, from when a profiler saw what run on which stream."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Interval(NamedTuple):
    """Something that ran on a stream; times in any one unit."""

    stream: object
    start: float
    end: float


def overlap_share(intervals: Iterable[Interval]) -> float:
    """Of the time in which any but the busiest stream works, the share in which that one works too; 0 for one."""
    by_stream: dict[object, list[tuple[float, float]]] = {}
    for interval in intervals:
        by_stream.setdefault(interval.stream, []).append((interval.start, interval.end))
    if len(by_stream) < 2:
        return 0.0
    unions = {stream: _union(spans) for stream, spans in by_stream.items()}
    busiest = max(unions, key=lambda stream: _length(unions[stream]))
    others = _union([span for stream, spans in unions.items() if stream != busiest for span in spans])
    both = sum(max(0.0, min(a_end, b_end) - max(a, b)) for a, a_end in others for b, b_end in unions[busiest])
    return both / _length(others) if _length(others) else 0.0


def kernels_of(trace: Path) -> list[Interval]:
    """Kernels and copies of a trace of torch's profiler (`export_chrome_trace`), by CUDA stream; microseconds."""
    events = json.loads(trace.read_text())["traceEvents"]
    return [
        Interval(event["args"]["stream"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "stream" in event.get("args", {})
    ]


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _length(spans: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)
