"""Stand-in CUDA streams and events: work runs at once, in issue order; events keep wall time."""

import threading
import time
from typing import Any

_local = threading.local()


class Stream:
    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.priority = priority
        self.device = device

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -1

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    @property
    def cuda_stream(self) -> int:
        return id(self)


class Event:
    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds."""
        return (end.time - self.time) * 1e3


_default_stream = Stream()


def default_stream(device: Any = None) -> Stream:
    return _default_stream


def current_stream(device: Any = None) -> Stream:
    return getattr(_local, "stream", _default_stream)


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        _local.stream = stream


def synchronize(device: Any = None) -> None:
    pass


class stream:
    """`with torch.cuda.stream(s):`; a `None` stream changes nothing."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> "stream":
        self.previous = current_stream()
        set_stream(self.stream)
        return self

    def __exit__(self, *exc: object) -> None:
        set_stream(self.previous)


def reset() -> None:
    _local.stream = _default_stream
