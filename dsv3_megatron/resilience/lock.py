"""One run in a folder of checkpoints: rank 0 holds a file there that says who it is, and shows signs of life in it.

    .run.lock    {"host": …, "process": …, "started": …, …}; its time of change is the last sign of life

A run that was killed leaves the file. The next one sees that it is stale: on the same machine its process is gone; of
another machine there has been no sign of life for `--rank-timeout-s`, measured by the file system's own clock.
"""

import atexit
import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument

__all__ = ["NAME", "Holder", "held", "hold_until_exit", "release"]

NAME = ".run.lock"
_BEAT_S = 5.0

_held: "_Held | None" = None


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        host, process: machine and process number of rank 0.
        started: local time of its start, for people.
        job: tells the ranks of one job from those of another.
        system: the boot and the process space in which `process` counts.
        birth: when the process began, in ticks since boot; numbers are used again.
    """

    host: str
    process: int
    started: str
    job: str
    system: str
    birth: int

    @classmethod
    def me(cls) -> "Holder":
        job = ":".join(os.environ.get(n, "") for n in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, now, job, _system(), _birth(pid) or 0)

    def is_gone(self) -> bool | None:
        """Whether its process has ended; None for one that cannot be seen from here."""
        if self.system != _system():
            return None
        return _birth(self.process) != self.birth


def _system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _birth(pid: int) -> int | None:
    """When a process of this machine began; None for one that has ended, waited for or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@contextlib.contextmanager
def held(folder: Path, rank: int, timeout_s: float) -> Iterator[None]:
    """Hold a folder for this job while the block runs.

    Args:
        folder: of `--save`; it exists.
        rank: of this process in the job; rank 0 holds the folder, the others see whether another job does.
        timeout_s: without a sign of life for so long, a holder on another machine is gone.

    Raises:
        RefusedArgument: another run that is alive holds it; the text names it.
    """
    take(folder, rank, timeout_s)
    try:
        yield
    finally:
        if rank == 0:
            release()


def hold_until_exit(save: str | None, skip_train: bool, timeout_s: float) -> None:
    """Hold the folder of `--save` as long as this process lives, in a program that is not ours to wrap.

    Raises:
        RefusedArgument: as `held`.
    """
    if save is None or skip_train:  # an evaluation writes nothing
        return
    folder = Path(save)
    with contextlib.suppress(OSError):  # what cannot be made, Megatron says
        folder.mkdir(parents=True, exist_ok=True)
        take(folder, int(os.environ.get("RANK", "0")), timeout_s)
        atexit.register(release)


def take(folder: Path, rank: int, timeout_s: float) -> None:
    """`held` without an end, for processes that are not ours to wrap; see there. Idempotent."""
    global _held
    path = folder.resolve() / NAME
    if rank != 0:
        holder = _read(path)
        if holder is not None and holder.job != Holder.me().job and holder.is_gone() is False:
            raise _refusal(folder, holder)
        return
    if _held is not None and _held.path == path and _held.me.process == os.getpid():
        return
    me = Holder.me()
    while not _try(path, me):
        holder = _read(path)
        if holder is not None and holder.is_gone() is False:
            raise _refusal(folder, holder)
        if (holder is None or holder.is_gone() is None) and _shows_life(path, timeout_s, holder):
            raise _refusal(folder, holder)
        _remove(path, holder)
    _held = _Held(path, me, min(_BEAT_S, timeout_s / 10))


def release() -> None:
    """Give up what this process holds, if anything."""
    global _held
    mine, _held = _held, None
    if mine is not None and mine.me.process == os.getpid():
        mine.end()


class _Held:
    """A folder that this process holds, with the thread that shows signs of life."""

    def __init__(self, path: Path, me: Holder, interval_s: float) -> None:
        self.path, self.me = path, me
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(interval_s,), name="run-lock", daemon=True)
        self._thread.start()

    def _beat(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            with contextlib.suppress(OSError):  # a file system may be away for a while
                os.utime(self.path)

    def end(self) -> None:
        self._stop.set()
        _remove(self.path, self.me)


def _try(path: Path, me: Holder) -> bool:
    """Write the file if there is none."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise RefusedArgument(
            f"--save {path.parent}: {error.strerror} while writing {NAME} there. Use a folder that can be written to"
        ) from error
    with os.fdopen(file, "w") as stream:
        stream.write(json.dumps(asdict(me)))
        stream.flush()
        os.fsync(stream.fileno())
    return True


def _read(path: Path) -> Holder | None:
    """Who holds the folder; None where nobody does, or the file is being written or was cut short."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remove(path: Path, holder: Holder | None) -> None:
    """Remove the file if it still is this holder's; one process at a time, so that nobody removes a newer one."""
    with _alone(path.parent):
        if _read(path) == holder:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    directory = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can lock; what is left is a moment's gap
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _shows_life(path: Path, timeout_s: float, holder: Holder | None) -> bool:
    """Wait until a holder that cannot be seen from here shows a sign of life, or has not for `timeout_s`."""
    told, first = False, _changed(path)
    while (changed := _changed(path)) is not None:
        if first is not None and changed > first:
            return True
        age = _now(path.parent) - changed
        if age > timeout_s:
            return False
        if not told and holder is not None:
            print(
                f"> {path} is held by process {holder.process} on {holder.host}: waiting up to "
                f"{timeout_s - age:.0f} s for a sign of life",
                flush=True,
            )
            told = True
        time.sleep(min(1.0, timeout_s / 20))
    return False


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _now(folder: Path) -> float:
    """The time by the clock that stamps files in the folder."""
    probe = folder / f"{NAME}-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_text("")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _refusal(folder: Path, holder: Holder | None) -> RefusedArgument:
    who: Any = (
        "another run that has just begun"
        if holder is None
        else (f"process {holder.process} on {holder.host}, since {holder.started}")
    )
    return RefusedArgument(
        f"--save {folder}: a run that is alive saves there ({who}); two would overwrite each other's checkpoints. Use "
        "another folder, or end that run"
    )
