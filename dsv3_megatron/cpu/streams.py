"""Stand-in CUDA streams and events: work runs at once, in issue order; events keep wall time.

While `record.record_streams()` is active they also tell the recorder who waits for whom.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Optional, Protocol


class Recorder(Protocol):
    """Who is told of every wait (`record.Recorder`)."""

    def clock(self, stream: Any) -> dict[Any, int]: ...
    def order_after(self, stream: Any, clock: dict[Any, int]) -> None: ...
    def order_host_after(self, clock: dict[Any, int]) -> None: ...
    def current_stream(self) -> Any: ...
    def stream_was_set(self) -> None: ...
    def synchronize(self) -> None: ...
    def collective(
        self, stream: Any, name: str, reads: Any, writes: Any, issue: Callable[[], Any]
    ) -> Any: ...


class Waits(Protocol):
    """Who is told when the host waits for its device (`like_nccl`)."""

    def synchronize(self) -> None:
        """The host waits for all that its device does."""

    def host(self, what: str) -> None:
        """The host waits."""


recorder: Recorder | None = None
waits: Waits | None = None
_local = threading.local()


class Stream:
    def __init__(self, device: Any = None, priority: int = 0, name: str = "", **_kwargs: Any) -> None:
        self.device = device
        self.priority = priority
        self.name = name or f"stream {id(self):#x}"

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -1

    def record_event(self, event: Optional["Event"] = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return True

    @property
    def cuda_stream(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Event:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.time = 0.0
        self.clock: dict[Any, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()
        if recorder is not None:
            self.clock = recorder.clock(stream or current_stream())

    def wait(self, stream: Stream | None = None) -> None:
        if recorder is not None:
            recorder.order_after(stream or current_stream(), self.clock)

    def synchronize(self) -> None:
        if recorder is not None:
            recorder.order_host_after(self.clock)
        if waits is not None:
            waits.host("a wait for an event or a stream")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds."""
        return (end.time - self.time) * 1e3


_default_stream = Stream(name="default stream")


def default_stream(device: Any = None) -> Stream:
    return _default_stream


def thread_stream() -> Stream:
    """The stream set last in this thread."""
    return getattr(_local, "stream", _default_stream)


def current_stream(device: Any = None) -> Stream:
    return thread_stream() if recorder is None else recorder.current_stream()


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        _local.stream = stream
        if recorder is not None:
            recorder.stream_was_set()


def synchronize(device: Any = None) -> None:
    if recorder is not None:
        recorder.synchronize()
    if waits is not None:
        waits.synchronize()


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
