"""Rewards in a process of their own: a function that hangs, dies or raises costs one sample, never the run.

    python -m dsv3_megatron.posttrain.reward_worker MODULE:FUNCTION

reads one JSON line `[prompt, response, answer]` after the other and answers each with `{"reward": …}` or
`{"error": …}`. Whatever the function prints goes to stderr.
"""

import importlib
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["RewardWorker"]

START_S = 120.0  # for the worker to import the reward's module
_READY = b'"ready"\n'


class RewardWorker:
    """Calls a reward by name, each time within a limit.

    Args:
        name: module:function, `reward(prompt, response, answer) -> float`.
        limit_s: seconds for one call.
    """

    def __init__(self, name: str, limit_s: float) -> None:
        self.name, self.limit_s = name, limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __call__(self, prompt: str, response: str, answer: Any) -> tuple[float | None, str]:
        """The reward, or None and why there is none: it raised, was no number, took too long, or its process ended."""
        try:
            worker = self._started()
            assert worker.stdin is not None
            worker.stdin.write(json.dumps([prompt, response, answer]).encode() + b"\n")
            worker.stdin.flush()
            reply = json.loads(self._line(worker, self.limit_s))
        except TimeoutError:
            self.close()
            return None, f"no reward within {self.limit_s:g} s"
        except (OSError, EOFError, ValueError) as error:
            self.close()
            return None, f"the reward's process ended ({error})"
        if "error" in reply:
            return None, str(reply["error"])
        return float(reply["reward"]), ""

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._buffer = b""
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
            if self._line(self._process, START_S) != _READY:
                raise EOFError("it did not start")
        return self._process

    def _line(self, worker: subprocess.Popen[bytes], limit_s: float) -> bytes:
        assert worker.stdout is not None
        end = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([worker.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            new = os.read(worker.stdout.fileno(), 1 << 16)
            if not new:
                raise EOFError(f"exit status {worker.wait(5)}")
            self._buffer += new
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None


def _answer(reward: Callable[..., Any], words: list[Any]) -> dict[str, Any]:
    try:
        value = float(reward(*words))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"reward": value} if math.isfinite(value) else {"error": f"the reward is {value}"}


def main() -> None:
    """Body of the worker process."""
    module, _, function = sys.argv[1].partition(":")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the function prints
    reward = getattr(importlib.import_module(module), function)
    replies.write(_READY)
    for line in sys.stdin.buffer:
        replies.write(json.dumps(_answer(reward, json.loads(line))).encode() + b"\n")


if __name__ == "__main__":
    main()
