"""What a long conversion says while it runs, on stderr: how far, how fast, how long it will take."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["Progress"]

_INTERVAL_S = 1.0


class Progress:
    """Counts bytes (from several threads) and prints a line every second, on a terminal in place."""

    def __init__(
        self,
        task: str,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """total: bytes to do."""
        self._task, self._total, self._stream, self._clock = task, total, stream or sys.stderr, clock
        self._lock = threading.Lock()
        self._done = 0
        self._begin = self._printed = clock()

    def add(self, num_bytes: int) -> None:
        """So many more bytes are done."""
        with self._lock:
            self._done += num_bytes
            if self._clock() - self._printed >= _INTERVAL_S:
                self._printed = self._clock()
                self._print("\r" if self._stream.isatty() else "\n")

    def close(self) -> None:
        """The last line."""
        self._print("\n")

    def line(self) -> str:
        """`hf-to-megatron 12.3 of 645.0 GB (2%), 1.20 GB/s, 8 min 47 s left`"""
        seconds = max(self._clock() - self._begin, 1e-9)
        rate = self._done / seconds
        share = 100 * self._done // max(self._total, 1)
        left = (self._total - self._done) / rate if rate else float("inf")
        return (
            f"{self._task} {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB ({share}%), {rate / 1e9:.2f} GB/s, "
            f"{_duration(left)} left"
        )

    def _print(self, end: str) -> None:
        print(self.line(), end=end, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
