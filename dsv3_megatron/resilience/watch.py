"""No rank outlives another: who is lost is noticed and named by all, whatever they wait for.

Each rank has a thread that shows signs of life in the job's TCP store. Rank 0 reads all of them, the others read rank
0's, and each looks at the processes beside it on its machine, and at its pipeline's messages (on NCCL only the device
waits for them). The first cause is written down for everyone; each rank prints it and ends. So the bound does not
depend on what a rank waits for: a collective, a pipeline message, a save.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from dsv3_megatron.resilience import lock

EXIT_STATUS = 70  # of a rank that ends because another one did
FAILED_FIRST = "__dsv3_failed_first__"  # attribute of an exception: whether no other rank failed before
_FINISHED = 1 << 40  # a count of signs of life that only a rank's end can reach
_CAUSE = "cause"
LOCAL_LOOK_S = 0.5

_current: "RankWatch | None" = None


def note(activity: str) -> None:
    """Say what this rank does now; it is told if the rank is lost."""
    if _current is not None:
        _current.activity = activity


def note_step(call: dict[str, Any]) -> None:
    """`note` for `training.hooks.before_step`."""
    note(f"in step {call['iteration'] + 1}")


class RankWatch:
    """The signs of life of one rank, and its look at the others'.

    Args:
        rank, world_size: of this process in the job.
        local_ranks: those on this machine; their processes are looked at directly, which takes half a second.
        timeout_s: a rank that gave no sign of life for so long is lost (its machine, its network, or it stands still).
        connect: makes a connection to the store, for this watch's own use; may block until the store is there.
    """

    def __init__(
        self, rank: int, world_size: int, local_ranks: range, timeout_s: float, connect: Callable[[], Any]
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.activity = "starting"
        self._connect = connect
        self._interval_s = min(timeout_s / 10, 5.0)
        self._store: Any = None
        self._cause: str | None = None
        self._first_cause: str | None = None
        self._stop = threading.Event()
        # Held for good once this process ends: the cause is its last line.
        self._last_words = threading.Lock()
        self._remote = [r for r in range(world_size) if r != rank] if rank == 0 else [0]
        self._local = [r for r in local_ranks if r != rank]
        self._pids: dict[int, int] = {}
        self._seen: dict[
            int, tuple[int, float]
        ] = {}  # rank: count of its signs, when the last one was noticed
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """This rank is done and will not be missed; rank 0, which may hold the store, waits for the others."""
        self._stop.set()
        self._thread.join(self.timeout_s)

    def fail(self, cause: str) -> bool:
        """Tell the others why this rank ends; whether it is the first to fail (so too where nobody can be told)."""
        self._cause = cause
        self.finish()
        return self._first_cause in (None, cause)

    def say(self, line: str, last: bool = False) -> None:
        """Print a line of this rank on standard error; who comes after the last one waits for the process's end."""
        self._last_words.acquire()
        print(f"[rank {self.rank}] {line}", file=sys.stderr, flush=True)
        if not last:
            self._last_words.release()

    @property
    def first_cause(self) -> str | None:
        """Why the job ends, once this rank has told its own cause."""
        return self._first_cause

    # --- the thread

    def _run(self) -> None:
        self._store = self._connect()
        self._store.set(_key("pid", self.rank), str(os.getpid()))
        contact, next_contact = time.monotonic(), 0.0
        while not self._stop.wait(LOCAL_LOOK_S):
            dead = self._dead_local_rank()
            now = time.monotonic()
            if dead is None and now < next_contact:
                continue
            try:
                self._beat(1)
                lost = self._told_cause() or self._silent_rank() or self._unless_finished(dead)
                lost = lost or self._late_message()
                contact, next_contact = now, now + self._interval_s
                answers = True
            except dist.DistError as error:  # the server has gone with its process
                answers = False
                lost = None if dead is None else f"rank {dead} is lost: its process has ended"
                if now - contact > self.timeout_s:
                    lost = f"{_store_owner()} is lost: the job's store does not answer any more ({error})"
            if lost is not None:
                self._end_process(lost, answers)
        with contextlib.suppress(dist.DistError):
            self._leave()

    def _beat(self, count: int) -> None:
        self._store.set(_key("activity", self.rank), self.activity)
        self._store.add(_key("life", self.rank), count)

    def _leave(self) -> None:
        """The last words of a rank that has finished or failed."""
        if self._cause is not None:
            self._first_cause = self._agree(self._cause)
        self._beat(_FINISHED)
        self._wait_for_others(self.timeout_s if self._cause is None else 3 * self._interval_s)

    def _wait_for_others(self, seconds: float) -> None:
        """Rank 0 may hold the store: it stays until the others have read what is to be read there."""
        end = time.monotonic() + seconds
        while (
            self.rank == 0 and time.monotonic() < end and any(map(self._is_here, range(1, self.world_size)))
        ):
            time.sleep(0.05)

    def _is_here(self, rank: int) -> bool:
        return self._life(rank) < _FINISHED and not (rank in self._pids and _has_ended(self._pids[rank]))

    def _life(self, rank: int) -> int:
        return self._store.add(_key("life", rank), 0)

    def _told_cause(self) -> str | None:
        return self._store.get(_CAUSE).decode() if self._store.check([_CAUSE]) else None

    def _dead_local_rank(self) -> int | None:
        for rank in self._local:
            if rank in self._pids and _has_ended(self._pids[rank]):
                return rank
        return None

    def _unless_finished(self, dead: int | None) -> str | None:
        for rank in self._local:
            if rank not in self._pids and self._store.check([_key("pid", rank)]):
                self._pids[rank] = int(self._store.get(_key("pid", rank)))
        if dead is None:
            return None
        if self._life(dead) >= _FINISHED:
            self._local.remove(dead)
            return None
        return self._agree(
            f"rank {dead} is lost: its process has ended (last seen {self._activity_of(dead)})"
        )

    def _silent_rank(self) -> str | None:
        now = time.monotonic()
        for rank in self._remote:
            count = self._life(rank)
            known, since = self._seen.get(rank, (0, now))
            if count != known or count == 0 or count >= _FINISHED:
                self._seen[rank] = (count, now)
            elif now - since > self.timeout_s:
                activity = self._activity_of(rank)
                return self._agree(
                    f"rank {rank} is lost: no sign of life for {self.timeout_s:g} s (last seen {activity})"
                )
        return None

    def _late_message(self) -> str | None:
        from dsv3_megatron.dualpipe.p2p import late_message

        late = late_message()
        return None if late is None else self._agree(f"rank {self.rank} ({self.activity}): {late}")

    def _activity_of(self, rank: int) -> str:
        key = _key("activity", rank)
        return self._store.get(key).decode() if self._store.check([key]) else "starting"

    def _agree(self, cause: str) -> str:
        """The cause that was written down first."""
        return self._store.compare_set(_CAUSE, "", cause).decode()

    def _end_process(self, cause: str, store_answers: bool) -> NoReturn:
        self.say(f"ends ({self.activity}): {cause}", last=True)
        for child in multiprocessing.active_children():
            child.kill()
        lock.release()
        if store_answers:
            with contextlib.suppress(dist.DistError):
                self._beat(_FINISHED)
                self._wait_for_others(self._interval_s + 2 * LOCAL_LOOK_S)
        os._exit(EXIT_STATUS)


def _has_ended(pid: int) -> bool:
    """Whether a process of this machine is gone, or dead and not yet waited for."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def _key(what: str, rank: int) -> str:
    return f"{what}/{rank}"


@contextlib.contextmanager
def watching(timeout_s: float) -> Iterator[None]:
    """Watch the ranks of this job (as torchrun's environment describes it) while the block runs.

    An error of this rank is told to the others. One that only follows from the loss of another rank (a connection that
    was closed, a message that did not come) waits until that one is known, which ends the process with its name.
    """
    global _current
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield
        return
    rank = int(os.environ["RANK"])
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))
    local = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    _current = watch = RankWatch(rank, world_size, local, timeout_s, _job_store)
    watch.start()
    try:
        yield
    except SystemExit as left:
        if left.code:
            watch.fail(f"rank {rank} ended with status {left.code} ({watch.activity})")
        else:
            watch.finish()
        raise
    except BaseException as error:
        if _follows_from_a_loss(error):
            watch.say(f"{error}; looking for the rank that was lost")
            time.sleep(1.5 * timeout_s)  # the watch ends this process as soon as it knows
        first = watch.fail(f"rank {rank} failed ({watch.activity}): {type(error).__name__}: {error}")
        setattr(error, FAILED_FIRST, first)
        if not first:
            watch.say(f"ends ({watch.activity}): {watch.first_cause}")
        raise
    else:
        watch.finish()
    finally:
        _current = None


def _job_store() -> Any:
    """A connection of its own: a store serves one request at a time."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(minutes=30),  # the server may start later
    )
    return dist.PrefixStore(f"dsv3-watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _store_owner() -> str:
    return "torchrun's agent" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def _follows_from_a_loss(error: BaseException) -> bool:
    from dsv3_megatron.dualpipe.p2p import PipelineTimeout

    texts = ("gloo", "nccl", "closed by peer", "reset by peer", "timed out")
    communication = (PipelineTimeout, dist.DistError)
    return isinstance(error, communication) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )
