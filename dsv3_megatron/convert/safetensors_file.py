"""Files of the safetensors format, read and written tensor by tensor without holding more than one.

A file is 8 bytes (little-endian length of the header), the header (JSON: name → dtype, shape, first and last byte),
and the tensors one after the other. Tensors are read through a memory map: what is not touched costs no memory.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dsv3_megatron.convert.errors import ConversionError

__all__ = ["DTYPES", "Entry", "SafetensorsFile", "header_of", "write_tensor"]

# Of the dtypes of the format, those that a DeepSeek-V3 has.
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # as in the format's own readers


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `end` are bytes from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class SafetensorsFile:
    """A file opened for reading.

    Attributes:
        entries: its tensors by name, in the order of the header.

    Raises:
        ConversionError: it is missing, truncated or not of the format; names the file, and the tensor if it is one.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ConversionError(f"{path}: {error.strerror}") from error
        self.size = os.fstat(self._file.fileno()).st_size
        self.entries = {entry.name: entry for entry in self._parse()}

    def _parse(self) -> list[Entry]:
        length = int.from_bytes(self._file.read(8), "little")
        begin = 8 + length
        if self.size < 8 or length > min(self.size - 8, _LONGEST_HEADER):
            raise ConversionError(
                f"{self.path}: truncated or not a safetensors file (header of {length} bytes)"
            )
        try:
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            rows = [
                (name, row["dtype"], tuple(row["shape"]), *row["data_offsets"])
                for name, row in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{self.path}: corrupt header ({error})") from error
        entries = []
        for name, dtype, shape, start, end in rows:
            if dtype not in DTYPES:
                raise ConversionError(f"{self.path}: {name}: dtype {dtype} is not one of {', '.join(DTYPES)}")
            if end - start != math.prod(shape) * DTYPES[dtype].itemsize or start < 0:
                raise ConversionError(
                    f"{self.path}: {name}: corrupt header, {shape} {dtype} in {end - start} bytes"
                )
            if begin + end > self.size:
                raise ConversionError(
                    f"{self.path}: {name}: truncated file, it ends at byte {self.size} and the tensor at {begin + end}"
                )
            entries.append(Entry(name, DTYPES[dtype], shape, begin + start, begin + end))
        return entries

    @cached_property
    def _map(self) -> mmap.mmap:
        # Private, so that torch may see it as writable memory; nothing is written.
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, name: str) -> Tensor:
        """A tensor, its data in the mapped file: not to be written to, and valid as long as this object."""
        entry = self.entries[name]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = entry.end - entry.start
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=entry.start)
        if entry.start % entry.dtype.itemsize:  # allowed by the format, not by torch
            raw = raw.clone()
        return raw.view(entry.dtype).view(entry.shape)

    def forget(self, name: str) -> None:
        """Tell the system that this tensor's pages are not needed any more."""
        entry = self.entries[name]
        first = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        if entry.end > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, entry.end - first)


def header_of(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a file with these tensors (name, dtype, shape), which have to be written in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Append a tensor's bytes, without a copy of them in memory."""
    file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
