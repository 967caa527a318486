"""Start a program in the sandbox, watch it, and say how it ended."""

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv3_megatron.errors import RefusedArgument

__all__ = ["Limits", "Outcome", "Run", "SandboxUnavailable", "run"]

Outcome = Literal["finished", "raised", "exited", "memory", "timeout", "output", "disk", "killed"]

LAUNCHER = Path(__file__).with_name("launcher.py")
WATCH_S = 0.05
# What a Python needs to read to start and to import its own library.
SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
    "/dev/urandom",
)


class SandboxUnavailable(RefusedArgument):
    """This machine cannot confine a program; nothing was run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: wall time, start of the interpreter included; processor time is bounded by one second more.
        memory_mib: address space, the interpreter's ~30 MiB included.
        output_bytes: of standard output and error together.
        disk_mib: of the temporary folder, and of one file.
        packages: whether installed packages (site-packages) can be imported, beside the standard library.
    """

    seconds: float = 10.0
    memory_mib: int = 512
    output_bytes: int = 1 << 20
    disk_mib: int = 16
    packages: bool = False


@dataclass(frozen=True)
class Run:
    """How a program ended.

    Attributes:
        outcome: "finished": it ran to its end; "raised": an exception left it (an assertion that failed, a syntax
            error); "exited": it left early, by sys.exit or os._exit; "memory", "timeout", "output", "disk": a limit;
            "killed": by a signal (a segmentation fault, for example).
        detail: the exception, the status or the signal, one line.
        stdout: what it wrote, as UTF-8 with replacements, up to the limit.
        stderr: the same.
        seconds: wall time.
    """

    outcome: Outcome
    detail: str
    stdout: str
    stderr: str
    seconds: float

    @property
    def finished(self) -> bool:
        """Whether it ran to its end: with tests at the end, whether they held."""
        return self.outcome == "finished"


def run(program: str, stdin: str = "", limits: Limits | None = None) -> Run:
    """Run a program as `__main__` in a fresh, confined Python of this version; returns when it is over.

    Several threads may call this at the same time.

    Args:
        program: Python source; tests go at its end.
        stdin: what it reads.
        limits: what it may use.

    Raises:
        SandboxUnavailable: this machine cannot enforce what the package's docstring lists.
    """
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"the sandbox needs Linux, this is {sys.platform}: run it in a container")
    folder = Path(tempfile.mkdtemp(prefix="dsv3-sandbox-"))
    try:
        return _run(program, stdin, limits, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(program: str, stdin: str, limits: Limits, folder: Path) -> Run:
    work, nonce = folder / "work", secrets.token_hex(16)
    work.mkdir()
    job = {
        "program": program,
        "nonce": nonce,
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_mib << 20,
        "file_bytes": limits.disk_mib << 20,
        "readable": _readable(limits.packages),
        "work": str(work),
    }
    # Surrogates in a model's text are no reason to fail here: JSON escapes them, and compile() refuses them there.
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "stdin").write_bytes(stdin.encode("utf-8", "surrogatepass"))
    reader, writer = os.pipe()
    flags = ["-I", "-B", "-X", "utf8"] if limits.packages else ["-I", "-S", "-B", "-X", "utf8"]
    begin = time.monotonic()
    try:
        with open(folder / "stdin", "rb") as given:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *flags,
                    str(LAUNCHER),
                    str(folder / "job.json"),
                    str(writer),
                    str(os.getpid()),
                ],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(writer,),
                cwd=work,
                env={"PATH": "/usr/bin:/bin", "HOME": str(work), "TMPDIR": str(work), "LANG": "C.UTF-8"},
                start_new_session=True,
            )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    watch = _Watch(process, reader, limits, work, begin)
    try:
        watch.follow()
    finally:
        watch.end()
    return _judged(watch, nonce, time.monotonic() - begin)


def _readable(packages: bool) -> list[str]:
    """Folders of Python and of the system's libraries."""
    own = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"]
    if packages:
        own += [*site.getsitepackages(), sys.prefix]
    return [
        os.path.realpath(path) for path in dict.fromkeys([*own, *SYSTEM]) if path and os.path.exists(path)
    ]


class _Watch:
    """The pipes of a running program, its time and its folder."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", reader: int, limits: Limits, work: Path, begin: float
    ):
        assert process.stdout is not None and process.stderr is not None
        self.process, self.limits, self.work = process, limits, work
        self.deadline = begin + limits.seconds
        self.stopped: Outcome | None = None
        self.output, self.error, self.verdict = bytearray(), bytearray(), bytearray()
        self._sinks = {
            process.stdout.fileno(): self.output,
            process.stderr.fileno(): self.error,
            reader: self.verdict,
        }
        self._reader = reader

    def follow(self) -> None:
        """Until the process ends, or a limit is reached."""
        ended = os.pidfd_open(self.process.pid)
        with selectors.DefaultSelector() as selector:
            selector.register(ended, selectors.EVENT_READ)
            for pipe in self._sinks:
                os.set_blocking(pipe, False)
                selector.register(pipe, selectors.EVENT_READ)
            next_look = time.monotonic() + WATCH_S
            try:
                while self.stopped is None and self.process.poll() is None:
                    now = time.monotonic()
                    if now >= self.deadline:
                        self.stopped = "timeout"
                    elif now >= next_look:
                        next_look = now + WATCH_S
                        if _size(self.work) > self.limits.disk_mib << 20:
                            self.stopped = "disk"
                    else:
                        for key, _ in selector.select(min(self.deadline, next_look) - now):
                            if key.fd != ended and not self._read(key.fd):
                                selector.unregister(key.fd)
            finally:
                os.close(ended)

    def _read(self, pipe: int) -> bool:
        """Take what a pipe holds; False at its end."""
        try:
            piece = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return True
        sink = self._sinks[pipe]
        sink += piece
        over = len(self.output) + len(self.error) - self.limits.output_bytes
        if over > 0 or len(self.verdict) > 1 << 16:
            self.stopped = "output"
            if over > 0:
                del sink[-over:]
        return bool(piece)

    def end(self) -> None:
        """Kill whatever is left, and take the last words."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its number is ours until wait()
        self.process.wait()
        for pipe in self._sinks:
            while self.stopped is None and self._more(pipe):
                pass
        os.close(self._reader)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()

    def _more(self, pipe: int) -> bool:
        try:
            return self._read(pipe) and self.stopped is None
        except OSError:
            return False


def _size(folder: Path) -> int:
    """Bytes of the files below a folder, and a page for each."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512 + 4096
            except OSError:
                continue
    return total


def _judged(watch: _Watch, nonce: str, seconds: float) -> Run:
    ready, ended, detail = False, None, ""
    for line in watch.verdict.split(b"\n"):
        try:
            word, said, text = json.loads(line)
        except (ValueError, TypeError):
            continue
        if word == nonce and said == "unsupported":
            raise SandboxUnavailable(f"the sandbox cannot confine a program here: {text}")
        if word == nonce and said == "ready":
            ready = True
        elif (word == nonce) == (said == "finished") and said in ("finished", "raised", "exited", "memory"):
            ended, detail = said, str(text)
    status = watch.process.returncode
    outcome: Outcome
    if watch.stopped is not None:
        outcome, detail = watch.stopped, _limit(watch)
    elif not ready:
        raise SandboxUnavailable(
            f"the sandbox's interpreter did not start (status {status}): {_text(watch.error)[-300:].strip()}"
        )
    elif status < 0:
        name = signal.Signals(-status).name
        outcome, detail = "killed", name
        if name in ("SIGXCPU",) or (name == "SIGKILL" and seconds >= watch.limits.seconds):
            outcome = "timeout"
    elif ended is None:
        outcome, detail = "exited", str(status)
    else:
        outcome = ended
    return Run(outcome, detail, _text(watch.output), _text(watch.error), seconds)


def _limit(watch: _Watch) -> str:
    limits = watch.limits
    return {
        "timeout": f"over {limits.seconds:g} s",
        "output": f"over {limits.output_bytes} bytes of output",
        "disk": f"over {limits.disk_mib} MiB in its folder",
    }.get(watch.stopped or "", "")


def _text(raw: bytearray) -> str:
    return raw.decode("utf-8", "replace")
