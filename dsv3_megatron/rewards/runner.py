"""`Scorer`: rewards in processes of their own, so that one which raises, hangs or dies costs a sample, not the run."""

import contextlib
import json
import logging
import math
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.rewards.named import Part, Reward, Weighted, parts_of, resolve

__all__ = ["Outcome", "Score", "Scorer", "score"]

Outcome = Literal["ok", "raised", "not finite", "not a number", "timeout", "killed"]
START_S = 300.0  # of a worker: imports, also on a busy machine; the time limit of a sample begins after it
MOST_LOGGED = 10  # failures of a call to `score` that are told one by one
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """What a response is worth.

    Attributes:
        value: the reward; the scorer's `on_failure` where the outcome is not "ok". Always finite.
        outcome: "ok"; "raised": an exception; "not finite": NaN or infinite; "not a number": something else was
            returned; "timeout": over the time limit, its process was killed; "killed": its process ended (a signal,
            os._exit).
        detail: one line on what went wrong, "" where nothing did.
        parts: weighted value of each part of a sum, by name; empty where the outcome is not "ok".
    """

    value: float
    outcome: Outcome = "ok"
    detail: str = ""
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the reward gave this value."""
        return self.outcome == "ok"


class Scorer:
    """Calls a reward on many samples; no sample ends the run.

    Args:
        reward: a name, "module:function", "name=weight,…", or a function of a module.
        workers: processes, started when they are needed and kept.
        timeout_s: of one call; then its process is killed and another started.
        on_failure: value of a sample whose reward failed; finite.
        isolate: False calls the reward in this process, one sample after the other: any function will do, raised
            errors and values that are not finite are still caught, but one that hangs or ends the process is not.

    Raises:
        RefusedArgument: the reward's name, or an argument, is wrong. Raised here, before a sample is scored.
    """

    def __init__(
        self,
        reward: "str | Reward | Callable[..., float]",
        *,
        workers: int = 1,
        timeout_s: float = 30.0,
        on_failure: float = 0.0,
        isolate: bool = True,
    ):
        if workers < 1:
            raise RefusedArgument(f"workers {workers}: must be 1 or more")
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise RefusedArgument(f"timeout_s {timeout_s}: must be a finite number of seconds above 0")
        if not math.isfinite(on_failure):
            raise RefusedArgument(f"on_failure {on_failure}: must be finite")
        self.timeout_s, self.on_failure = timeout_s, on_failure
        self._reward = resolve(reward)  # refuses a wrong name at once, also where workers call it
        self._parts = parts_of(reward) if isolate else ()
        self._workers = [_Worker(self._parts) for _ in range(workers)] if isolate else []
        self.outcomes: Counter[str] = Counter()  # of all samples so far

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[Any] | None = None,
        on_score: "Callable[[int, Score], None] | None" = None,
    ) -> list[Score]:
        """Scores in the order of the samples.

        Args:
            answers: a JSON value per sample; None: nothing is given.
            on_score: called with place and score as each is done, in any order, never at the same time.

        Raises:
            RefusedArgument: the lists differ in length, or an answer is no JSON value.
        """
        answers = [None] * len(prompts) if answers is None else answers
        if not len(prompts) == len(responses) == len(answers):
            raise RefusedArgument(
                f"{len(prompts)} prompts, {len(responses)} responses, {len(answers)} answers: must be equally many"
            )
        samples = list(zip(prompts, responses, answers, strict=True))
        scores: list[Score | None] = [None] * len(samples)
        failed: Counter[str] = Counter()

        def keep(place: int, found: Score) -> None:
            scores[place] = found
            self.outcomes[found.outcome] += 1
            failed.update([] if found.ok else [found.outcome])
            if not found.ok and failed.total() <= MOST_LOGGED:
                logger.warning("reward of sample %d: %s: %s", place, found.outcome, found.detail)
            if on_score is not None:
                on_score(place, found)

        if self._workers:
            self._spread(samples, keep)
        else:
            for place, sample in enumerate(samples):
                keep(place, self._checked(_call(self._reward, *sample)))
        if failed:
            logger.warning("%d of %d rewards failed and count %g: %s", failed.total(), len(samples), self.on_failure,
                           ", ".join(f"{count} {outcome}" for outcome, count in failed.most_common()))  # fmt: skip
        return [found for found in scores if found is not None]

    def _spread(self, samples: list[tuple[str, str, Any]], keep: Callable[[int, Score], None]) -> None:
        lines = [_encoded(place, sample) for place, sample in enumerate(samples)]
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Score] | BaseException] = queue.SimpleQueue()
        for place in range(len(samples)):
            todo.put(place)

        def serve(worker: "_Worker") -> None:
            try:
                while True:
                    place = todo.get_nowait()
                    done.put((place, self._checked(worker.call(lines[place], self.timeout_s))))
            except queue.Empty:
                return
            except BaseException as error:  # of ours, not of a reward's: tell the caller
                done.put(error)

        threads = [
            threading.Thread(target=serve, args=(worker,), daemon=True)
            for worker in self._workers[: len(samples)]
        ]
        for thread in threads:
            thread.start()
        for _ in samples:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            keep(*found)
        for thread in threads:
            thread.join()

    def _checked(self, said: dict[str, Any]) -> Score:
        """A worker's words as a score."""
        if "outcome" in said:
            return Score(self.on_failure, said["outcome"], said["detail"])
        if not math.isfinite(said["value"]):
            return Score(self.on_failure, "not finite", f"the reward returned {said['value']}")
        return Score(said["value"], parts=said["parts"])

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def score(
    reward: "str | Reward | Callable[..., float]",
    prompts: Sequence[str],
    responses: Sequence[str],
    answers: Sequence[Any] | None = None,
    **options: Any,
) -> list[Score]:
    """`Scorer(reward, **options).score(prompts, responses, answers)`, its processes started and ended here."""
    with Scorer(reward, **options) as scorer:
        return scorer.score(prompts, responses, answers)


def _call(reward: Any, prompt: str, response: str, answer: Any) -> dict[str, Any]:
    """The reward's value with its parts, or the outcome: what a worker answers."""
    try:
        if isinstance(reward, Weighted):
            parts = reward.each(prompt, response, answer)
            return {"value": math.fsum(parts.values()), "parts": parts}
        value = reward(prompt, response, answer)
    except (Exception, SystemExit) as error:
        return {"outcome": "raised", "detail": _line(error)}
    try:
        return {"value": float(value), "parts": {}}
    except Exception:  # whatever its __float__ does
        return {"outcome": "not a number", "detail": f"the reward returned a {type(value).__name__}"}


def _line(error: BaseException) -> str:
    try:
        said = str(error)
    except Exception:  # an error of the reward's own may fail at this too
        said = "(no text)"
    # Half a surrogate pair could not be printed, and would end the run that tells of it.
    text = f"{type(error).__name__}: {said}".encode("utf-8", "backslashreplace").decode()
    return text.replace("\n", " ")[:500]


def _encoded(place: int, sample: tuple[str, str, Any]) -> bytes:
    try:
        return json.dumps(sample).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise RefusedArgument(
            f"sample {place}: prompt, response and answer must be JSON values ({error})"
        ) from error


class _Worker:
    """A process that answers one line per sample; started again after it died."""

    def __init__(self, parts: tuple[Part, ...]):
        self._words = [json.dumps([[part.name, part.weight] for part in parts]), json.dumps(sys.path)]
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def call(self, line: bytes, timeout_s: float) -> dict[str, Any]:
        """Send a sample, wait for what is said of it."""
        if self._process is not None and self._process.poll() is not None:
            self.end()  # it died between two samples: this one is not to blame
        if self._process is None and (failure := self._start()):
            return failure
        process, deadline = self._process, time.monotonic() + timeout_s
        assert process is not None
        answer = self._read(deadline) if self._write(line, deadline) else b""
        if answer:
            return json.loads(answer)
        if answer is not None:  # it is ending: its own status says more than that of the kill below
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
        self.end()
        if answer is None:
            return {"outcome": "timeout", "detail": f"over {timeout_s:g} s"}
        return {"outcome": "killed", "detail": _ended(process.returncode)}

    def _start(self) -> dict[str, Any] | None:
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dsv3_megatron.rewards.worker", *self._words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        ready = self._read(time.monotonic() + START_S)
        if ready:
            return None
        self.end()
        why = f"did not start within {START_S:g} s" if ready is None else "ended while it started"
        return {"outcome": "killed", "detail": f"the reward's process {why}"}

    def _write(self, line: bytes, deadline: float) -> bool:
        assert self._process is not None and self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_WRITE)
            while line:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return True  # it reads nothing: the answer will not come in time either
                try:
                    line = line[os.write(pipe, line) :]
                except BrokenPipeError:
                    return False
        return True

    def _read(self, deadline: float) -> bytes | None:
        """A line; b"" where the process has ended, None where the time is over."""
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                piece = os.read(pipe, 1 << 16)
                if not piece:
                    return b""
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def end(self) -> None:
        """Kill it with its group."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _ended(status: int | None) -> str:
    if status is None:
        return "the reward's process closed its output"
    if status < 0:
        return f"the reward's process was killed by {signal.Signals(-status).name}"
    return f"the reward's process ended with status {status}"
