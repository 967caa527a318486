"""Transformer Engine's part of the bundle: its library with the code of sm_90 alone, its extension's source.

The library's wheel holds machine code for every architecture (190 MB for 2.12). What is not for sm_90 is zeroed, which
the loader never reads on a Hopper, and the wheel is compressed again with xz inside; `run.sh` restores it. The torch
extension is built on the machine, from its source, where nvcc is.
"""

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ARCHITECTURE = 90
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes behind it
_MAGIC = 0xBA55ED50
_ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of this header, bytes behind it
_ARCHITECTURE_AT = 28  # in an entry's header


class Entry(NamedTuple):
    """Code of one architecture in a fat binary: where its bytes are."""

    architecture: int
    start: int
    end: int


def entries(library: bytes | bytearray) -> Iterator[Entry]:
    """All code in the fat binaries of a library."""
    at = 0
    magic = struct.pack("<I", _MAGIC)
    while (at := library.find(magic, at)) >= 0:
        _, _, head, size = _CONTAINER.unpack_from(library, at)
        inside, end = at + head, at + head + size
        if head != _CONTAINER.size or end > len(library):
            at += 4  # the same four bytes by chance
            continue
        while inside + _ARCHITECTURE_AT + 4 <= end:
            _, _, entry_head, payload = _ENTRY.unpack_from(library, inside)
            if entry_head < _ARCHITECTURE_AT + 4 or inside + entry_head + payload > end:
                break
            (architecture,) = struct.unpack_from("<I", library, inside + _ARCHITECTURE_AT)
            yield Entry(architecture, inside + entry_head, inside + entry_head + payload)
            inside += entry_head + payload
        at = end


def keep(library: bytes, architecture: int = ARCHITECTURE) -> bytes:
    """The library with the code of all other architectures zeroed; its size and its headers stay."""
    changed = bytearray(library)
    for entry in list(entries(library)):
        if entry.architecture != architecture:
            changed[entry.start : entry.end] = bytes(entry.end - entry.start)
    return bytes(changed)
