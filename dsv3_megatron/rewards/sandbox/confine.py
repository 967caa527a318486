"""Take rights away from the process that calls this, for good: resource limits, capabilities, Landlock, seccomp.

Standard library only, and no import of the package: the launcher loads it by its path in an empty interpreter. None
of it needs root, and root is bound by it too.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct

from syscalls import ALLOWED, CHECKED, MISSING, NUMBERS

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
NR_CAPSET = {"x86_64": 126, "aarch64": 91}


class Unsupported(Exception):
    """The kernel does not offer what the sandbox needs."""


def _call(function, *words):
    """A C function's result; OSError where it is -1."""
    result = function(*words)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def die_with(parent):
    """Be killed when the thread that started this process ends."""
    _call(_libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit_resources(seconds, memory_bytes, file_bytes, open_files=64):
    """Hard limits: processor seconds, address space, size of a file, open files; no core file."""
    for name, value in (
        ("CPU", max(1, int(seconds + 1))),
        ("AS", memory_bytes),
        ("FSIZE", file_bytes),
        ("NOFILE", open_files),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def drop_privileges():
    """No capability, now or later, and none from files that are started."""
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break  # not root (nothing to drop), or past the last one
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _call(_libc.syscall, NR_CAPSET[machine()], header, bytes(24))
    _call(_libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def machine():
    """x86_64 or aarch64; `Unsupported` elsewhere."""
    name = platform.machine()
    if name not in NR_CAPSET:
        raise Unsupported(f"the processor {name}: the sandbox knows x86_64 and aarch64")
    return name


# Landlock: files -----------------------------------------------------------------------------------------------------

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
TRUNCATE = 1 << 14
# Number of file rights that each version of Landlock knows (index: version).
RIGHTS_OF_ABI = (0, 13, 14, 15, 15, 16)


def landlock_version():
    """Version of the kernel's Landlock, 0 without it."""
    return max(0, _libc.syscall(LANDLOCK_CREATE, None, 0, 1))


def restrict_files(readable, writable):
    """From now on only files under `readable` can be opened for reading, and only under `writable` for more."""
    version = landlock_version()
    if not version:
        raise Unsupported(
            "a Linux without Landlock (kernel 5.13 or later, with landlock in /sys/kernel/security/lsm)"
        )
    rights = (1 << RIGHTS_OF_ABI[min(version, len(RIGHTS_OF_ABI) - 1)]) - 1
    rules = [rights]
    if version >= 4:
        rules.append(3)  # TCP: bind, connect
    if version >= 6:
        rules.append(3)  # abstract sockets, signals: only inside
    attributes = struct.pack(f"{len(rules)}Q", *rules)
    ruleset = _call(_libc.syscall, LANDLOCK_CREATE, attributes, len(attributes), 0)
    own = (
        READ_FILE
        | READ_DIR
        | WRITE_FILE
        | REMOVE_DIR
        | REMOVE_FILE
        | MAKE_DIR
        | MAKE_REG
        | (TRUNCATE & rights)
    )
    for path, folder_rights in [(path, READ_FILE | READ_DIR) for path in readable] + [
        (path, own) for path in writable
    ]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = (
            folder_rights if os.path.isdir(path) else folder_rights & (READ_FILE | WRITE_FILE | TRUNCATE)
        )
        _call(_libc.syscall, LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed & rights, place), 0)
        os.close(place)
    _call(_libc.syscall, LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


# seccomp: everything else --------------------------------------------------------------------------------------------

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # BPF
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD = 0x00010000
# Of fcntl: duplicates, flags, locks; not F_SETOWN, which sends signals to others.
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)
# Of ioctl: TCGETS (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)


def _words(argument):
    """Offsets of an argument's low and high half in `struct seccomp_data` (both machines are little-endian)."""
    return 16 + 8 * argument, 20 + 8 * argument


def _one_of(argument, values):
    """Allow a call whose argument (32 bits are looked at) is one of these; else fall through to the refusal."""
    code = [(_LOAD, 0, 0, _words(argument)[0])]
    for place, value in enumerate(values):
        code.append((_EQUAL, len(values) - place, 0, value))
    return [*code, *_refuse(errno.EPERM), (_RETURN, 0, 0, _ALLOW)]


def _refuse(code):
    return [(_RETURN, 0, 0, _ERRNO | code)]


def _open(argument):
    """Not O_TRUNC with O_RDONLY, which would empty a file that may be read (older Landlock does not see it)."""
    return [
        (_LOAD, 0, 0, _words(argument)[0]),
        (_ANY_BIT, 0, 2, os.O_TRUNC),
        (_ANY_BIT, 1, 0, os.O_ACCMODE),
        *_refuse(errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _null(argument):
    """Only where a pointer is null."""
    low, high = _words(argument)
    return [
        (_LOAD, 0, 0, low),
        (_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, high),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        *_refuse(errno.EPERM),
    ]


def _thread_only():
    """clone: threads, no processes."""
    return [
        (_LOAD, 0, 0, _words(0)[0]),
        (_ANY_BIT, 1, 0, CLONE_THREAD),
        *_refuse(errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _checks():
    own = [os.getpid()]
    return {
        "open": _open(1),
        "openat": _open(2),
        "fcntl": _one_of(1, FCNTL),
        "ioctl": _one_of(1, IOCTL),
        "socketpair": _one_of(0, [1]),  # AF_UNIX: event loops need a pair; it reaches nobody else
        "sendto": _null(4),  # no address: a datagram socket of a pair could name another's
        "kill": _one_of(0, own),
        "tgkill": _one_of(0, own),
        "clone": _thread_only(),
        "prlimit64": _one_of(0, [0]),  # of itself, not of its parent
    }


def system_call_filter():
    """The filter as BPF, a list of (code, jump if true, jump if false, constant)."""
    name = machine()
    column = 0 if name == "x86_64" else 1
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCHITECTURE[name]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if name == "x86_64":  # the x32 numbers
        code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    checks = _checks()
    bodies = (
        [(call, [(_RETURN, 0, 0, _ALLOW)]) for call in ALLOWED]
        + [(call, checks[call]) for call in CHECKED]
        + [(call, _refuse(errno.ENOSYS)) for call in MISSING]
    )
    for call, body in bodies:
        number = NUMBERS[call][column]
        if number is not None:
            code += [(_EQUAL, 0, len(body), number), *body]
    return code + _refuse(errno.EPERM)


def restrict_calls():
    """Install the filter in this thread and in those that it starts."""
    packed = b"".join(struct.pack("HBBI", *line) for line in system_call_filter())
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(packed) // 8, ctypes.addressof(buffer))
    _call(_libc.prctl, PR_SET_SECCOMP, 2, program, 0, 0)
