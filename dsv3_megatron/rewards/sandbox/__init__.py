"""Run Python that nobody has read, for example a model's answer: `run(program) -> Run`.

Enforced, by the kernel and without root (root is bound as well); where one of these is missing, nothing is run and
`SandboxUnavailable` says why:

- **files** (Landlock, Linux 5.13): nothing outside a temporary folder can be opened, made, changed or removed,
  except that Python's own library, the system's shared libraries and the time zones can be read;
- **network**: no sockets, whatever the family (seccomp); a connected pair inside the process is all there is;
- **processes**: none can be started, threads can; no signal, limit, trace or memory access reaches another process, the
  parent included (seccomp; root's capabilities are given up);
- **every other call**: the filter lists what is allowed, the rest answers "not permitted";
- **memory**: address space; **processor time**; **wall time**, after which the process group is killed; **output**
  to the terminal; size of a file, and of the folder (looked at every 50 ms, so it can be exceeded by what is written
  meanwhile);
- the environment is empty, standard input is what was given, and the process dies with the thread that waits for it.

Not enforced: whether a file exists outside, and its size, can be asked (`os.stat`); the time, the name and version
of the machine's kernel can be read; the processors are shared, so that a program can slow others down until its time
is over; a fault of the kernel itself is not guarded against (use a virtual machine for that). A program that is
tested by code in the same interpreter can deceive this code: early exits are caught, an object that is equal to
everything or a search through the interpreter's frames are not.
"""

from dsv3_megatron.rewards.sandbox.watch import Limits, Run, SandboxUnavailable, run

__all__ = ["Limits", "Run", "SandboxUnavailable", "run"]
