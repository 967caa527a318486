"""Programs that try to get out of the sandbox, beside ones that only use what they may."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3_megatron.rewards.sandbox import Limits, SandboxUnavailable, run
from dsv3_megatron.rewards.sandbox.watch import LAUNCHER

SHORT = Limits(seconds=1.0, memory_mib=256, output_bytes=1 << 16, disk_mib=4)
AMPLE = Limits(seconds=30.0)


def test_an_ordinary_program_finishes():
    result = run(
        """
import asyncio, json, math, os, random, re, sys, tempfile, threading, zoneinfo
from dataclasses import dataclass
@dataclass
class Pair:
    a: int
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
async def nap(): await asyncio.sleep(0.001)
asyncio.run(nap())
with open("note", "w") as file: file.write("x" * 1000)
os.rename("note", "other"); assert len(open("other").read()) == 1000; os.remove("other")
with tempfile.TemporaryDirectory() as folder: open(folder + "/f", "w").close()
assert input() == "given" and __name__ == "__main__"
print(Pair(3), math.pi)
""",
        stdin="given\n",
        limits=AMPLE,
    )
    assert (result.outcome, result.stderr) == ("finished", "")
    assert result.stdout == "thread\nPair(a=3) 3.141592653589793\n"


ATTEMPTS = [
    ("import socket; socket.socket()", "PermissionError"),
    ("import socket; socket.socket(socket.AF_UNIX)", "PermissionError"),
    ("import socket; a, b = socket.socketpair(type=socket.SOCK_DGRAM); a.sendto(b'x', '/x')", "PermissionError"),
    ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')", "URLError"),
    ("open('/etc/passwd').read()", "PermissionError"),
    ("import os; os.listdir('/')", "PermissionError"),
    ("open('/proc/self/environ').read()", "PermissionError"),
    ("import os; os.symlink('/etc/passwd', 'link'); open('link').read()", "PermissionError"),
    ("import os; os.link('/etc/passwd', 'link'); open('link').read()", "PermissionError"),
    ("open('/tmp/outside', 'w')", "PermissionError"),
    ("open('../outside', 'w')", "PermissionError"),
    ("open('../job.json').read()", "PermissionError"),
    ("import os; os.chmod('/tmp', 0o777)", "PermissionError"),
    ("import os; os.chown('/tmp', 1, 1)", "PermissionError"),
    ("import os; os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)", "PermissionError"),
    ("import os; os.truncate(os.__file__, 0)", "PermissionError"),
    ("import subprocess; subprocess.run(['/bin/true'])", "PermissionError"),
    ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
    ("import os; os.posix_spawn('/bin/true', ['true'], {})", "PermissionError"),
    ("import multiprocessing; multiprocessing.Process(target=print).start()", "PermissionError"),
    ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    ("import os; os.kill(-1, 9)", "PermissionError"),
    ("import os; os.killpg(0, 9)", "PermissionError"),
    ("import os; os.pidfd_open(os.getppid())", "PermissionError"),
    ("import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", "PermissionError"),
    ("import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
    ("import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", "PermissionError"),
    ("import os; os.sched_setaffinity(os.getppid(), {0})", "PermissionError"),
    ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "Exception"),
    ("import os; os.memfd_create('x')", "PermissionError"),
    ("import os; os.unshare(os.CLONE_NEWUSER)", "PermissionError"),
    ("import os; os.setuid(1)", "PermissionError"),
]  # fmt: skip


def test_what_is_refused_raises():
    """One after the other in one program: each attempt raises what is said, and the program goes on."""
    program = (
        f"attempts = {ATTEMPTS!r}\n"
        + """
import urllib.error
for attempt, expected in attempts:
    try:
        exec(attempt, {"__name__": "attempt"})
    except (OSError, ValueError) as error:
        assert expected in [kind.__name__ for kind in type(error).__mro__], (attempt, error)
    else:
        raise SystemError(attempt)
print(len(attempts))
"""
    )
    result = run(program, limits=AMPLE)
    assert result.finished and result.stdout == f"{len(ATTEMPTS)}\n", result


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import threading\nwhile True: threading.Thread(target=__import__('time').sleep, args=(99,)).start()",
    ],
)
def test_bombs_of_processes_and_threads(program):
    assert run(program, limits=AMPLE).outcome == "raised"


def test_a_raw_system_call_is_filtered_too():
    """Not only Python's wrappers: socket, execve, ptrace and a process by clone, called by number."""
    result = run(
        """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
numbers = {"x86_64": (41, 59, 101, 56), "aarch64": (198, 221, 117, 220)}[os.uname().machine]
for number in numbers:
    assert libc.syscall(number, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM, number
""",
        limits=AMPLE,
    )
    assert result.finished, result


@pytest.mark.parametrize(
    "program, outcome",
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(99)", "timeout"),
        ("import signal as s\nfor n in range(1, 32):\n  try: s.signal(n, s.SIG_IGN)\n  except OSError: 0\nwhile 1: 0",
         "timeout"),
        ("import os; os.close(1); os.close(2)\nwhile True: pass", "timeout"),
        ("import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nwhile True: pass",
         "timeout"),
        ("x = 'a' * 10**9", "memory"),
        ("x = []\nwhile True: x.append(bytearray(10**6))", "memory"),
        ("while True: print('x' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
        ("for i in range(10**6): open(str(i), 'w').write('x' * 100000)", "disk"),
        ("for i in range(10**9): open(str(i), 'w')", "disk"),
        ("import os; os._exit(0)", "exited"),
        ("import sys; sys.exit(0)", "exited"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
        ("import os; os.abort()", "killed"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
    ],
)  # fmt: skip
def test_limits_and_ends(program, outcome):
    result = run(program, limits=SHORT)
    assert result.outcome == outcome, result
    assert result.seconds < SHORT.seconds + 2
    assert len(result.stdout) + len(result.stderr) <= SHORT.output_bytes


def test_a_file_ends_at_its_limit():
    result = run("f = open('a', 'wb')\nwhile True: f.write(b'x' * 10**6)", limits=AMPLE)
    assert result.outcome in ("raised", "disk")


def test_tests_at_the_end_cannot_be_left_out():
    """The verdict is the end of the program: a status of 0 or a word on a terminal or pipe is none."""
    forge = """
import os
for fd in range(3, 64):
    try: os.write(fd, b'["-", "finished", ""]\\n["0", "finished", ""]\\n')
    except OSError: pass
print("finished"); os._exit(0)
"""
    assert run(forge + "\nassert False", limits=AMPLE).outcome == "exited"
    assert run("def f(): return 1\nassert f() == 2", limits=AMPLE).outcome == "raised"  # the control
    assert run("def f(): return 1\nassert f() == 1", limits=AMPLE).finished


def test_the_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    result = run("import os; print(sorted(os.environ))", limits=AMPLE)
    assert "SECRET_TOKEN" not in result.stdout and result.finished


def test_text_that_is_no_utf8_and_source_that_is_no_python():
    assert run("x = '\ud800'", limits=AMPLE).outcome == "raised"
    assert run("def", limits=AMPLE).detail.startswith("SyntaxError")
    assert run("x = 1\0", limits=AMPLE).outcome == "raised"
    assert run("", limits=AMPLE).finished


def children_of_this_process() -> set[str]:
    """Process ids; also of those that have ended and were not waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.add(stat.parent.name)
    return found


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, children = set(os.listdir("/proc/self/fd")), children_of_this_process()
    run("open('a', 'w').write('x')\nwhile True: pass", limits=Limits(seconds=0.5))
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == before
    assert children_of_this_process() <= children


def test_several_threads_at_once():
    results = {}

    def one(number):
        results[number] = run(f"print({number})", limits=AMPLE).stdout

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n" for number in range(4)}


def test_the_program_dies_with_its_starter():
    """Killing the process that waits kills the program: no orphan goes on."""
    mark = f"time.sleep(86{os.getpid()})"
    code = f"from dsv3_megatron.rewards.sandbox import run, Limits; run('import time; {mark}', limits=Limits(99))"
    starter = subprocess.Popen([sys.executable, "-c", code])
    try:
        _wait_for(lambda: _children(starter.pid))
        child = _children(starter.pid)[0]
        time.sleep(0.3)
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    _wait_for(lambda: not os.path.exists(f"/proc/{child}") or _state(child) == "Z")


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_landlock_nothing_runs(monkeypatch, tmp_path):
    """A machine that cannot enforce gets a refusal, not a weaker sandbox."""

    for name in ("confine.py", "syscalls.py", "launcher.py"):
        text = LAUNCHER.with_name(name).read_text()
        text = text.replace("return max(0, _libc.syscall(LANDLOCK_CREATE, None, 0, 1))", "return 0")
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("dsv3_megatron.rewards.sandbox.watch.LAUNCHER", tmp_path / "launcher.py")
    with pytest.raises(SandboxUnavailable, match="without Landlock"):
        run("print(1)")
