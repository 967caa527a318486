"""Megatron's `torch_dist` checkpoints (torch.distributed.checkpoint files), read tensor by tensor; no process group.

A checkpoint is a folder with `.metadata` (pickled: shapes, and where each piece of a tensor lies in which file),
`*.distcp` (the pieces, each as `torch.save` writes it) and `metadata.json` (Megatron's name of the format). The folder
that is given to `--load` holds one per iteration, and `latest_checkpointed_iteration.txt` says which is the last.
"""

import io
import math
import mmap
import os
import pickle
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from dsv3_megatron.checkpoint import plain_pickle
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.inventory import Slot

__all__ = ["COMMON", "METADATA", "RELEASE", "TRACKER", "DistCheckpoint", "checkpoint_folder"]

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
METADATA = ".metadata"
COMMON = "common_state/shard_0_1"  # what is no tensor: arguments, iteration, ...


def checkpoint_folder(folder: Path) -> Path:
    """The newest checkpoint of a folder given to `--load` or `--save`, or the folder if it is a checkpoint itself."""
    if (folder / METADATA).exists():
        return folder
    try:
        step = (folder / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"{folder}: neither {METADATA} nor {TRACKER} is there: no Megatron checkpoint"
        ) from error
    if step != RELEASE and not step.isdecimal():
        raise ConversionError(f"{folder / TRACKER}: {step[:40]!r} is neither an iteration nor {RELEASE}")
    name = RELEASE if step == RELEASE else f"iter_{int(step):07d}"
    if not (folder / name / METADATA).exists():
        raise ConversionError(f"{folder / name / METADATA} is missing, but {TRACKER} says {step}")
    return folder / name


class DistCheckpoint:
    """A checkpoint opened for reading, saved in any layout.

    Attributes:
        path: its folder.
        tensors: shape, dtype and pieces of each tensor by key.
    """

    def __init__(self, folder: Path):
        self.path = checkpoint_folder(folder)
        try:
            metadata: Metadata = pickle.loads((self.path / METADATA).read_bytes())
            self._storage: dict[MetadataIndex, Any] = dict(metadata.storage_data)
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ImportError) as error:
            raise ConversionError(f"{self.path / METADATA}: corrupt ({error})") from error
        entries = metadata.state_dict_metadata
        self.tensors = {
            key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._pieces: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._check_files()

    def _check_files(self) -> None:
        """Every piece lies inside its file."""
        sizes: dict[str, int] = {}
        for index, info in self._storage.items():
            path = self.path / info.relative_path
            if info.relative_path not in sizes:
                if not path.exists():
                    raise ConversionError(f"{path}: missing; {METADATA} has {index.fqn} there")
                sizes[info.relative_path] = path.stat().st_size
            if info.offset + info.length > sizes[info.relative_path]:
                raise ConversionError(
                    f"{path}: truncated: {index.fqn} ends at byte {info.offset + info.length}"
                )
            if getattr(info, "transform_descriptors", None):
                raise ConversionError(f"{path}: {index.fqn}: transformed storage is not supported")

    def arguments(self) -> Namespace:
        """Megatron's arguments of the run that saved it."""
        path, index = self.path / "common.pt", MetadataIndex(COMMON)
        if path.exists():  # checkpoints of older versions
            common = torch.load(path, map_location="cpu", weights_only=False, pickle_module=plain_pickle)
        elif index in self._storage:
            common = self._load(index, pickle_module=plain_pickle)[0]
        else:
            raise ConversionError(f"{self.path}: no common state: not saved by Megatron")
        if "args" not in common:
            raise ConversionError(f"{self.path}: has no arguments of the run that saved it")
        return common["args"]

    def locate(self, slot: Slot) -> Slot:
        """The slot as this checkpoint has it: layers of equal shape may be stacked in one tensor [layers, ...]."""
        if slot.key in self.tensors:
            return slot
        block, _, rest = slot.key.partition(".layers.")
        number, _, rest = rest.partition(".")
        stacked = f"{block}.layers.{rest}"
        if not number.isdigit() or stacked not in self.tensors:
            raise ConversionError(f"{self.path}: {slot.key} is missing")
        shape = (self.tensors[stacked].size[0], *slot.global_shape)
        return Slot(stacked, shape, (int(number), *slot.offset), (1, *slot.shape))

    def check(self, slot: Slot) -> None:
        """The tensor has the shape that the model gives it.

        Raises:
            ConversionError: names checkpoint and tensor.
        """
        slot = self.locate(slot)
        size = tuple(self.tensors[slot.key].size)
        if size != slot.global_shape:
            raise ConversionError(
                f"{self.path}: {slot.key}: shape {size}, but the model has {slot.global_shape}"
            )

    def dtype(self, slot: Slot) -> torch.dtype:
        return self.tensors[self.locate(slot).key].properties.dtype

    def read(self, slot: Slot) -> Tensor:
        """The tensor at a slot, put together from the pieces in which it was saved.

        Where one piece holds all of it, its data is in the mapped file: not to be written to.
        """
        slot = self.locate(slot)
        result: Tensor | None = None
        missing = math.prod(slot.shape)
        for piece in self._overlapping(slot):
            starts = [max(a, b) for a, b in zip(slot.offset, piece.offsets, strict=True)]
            ends = [
                min(a + n, b + m)
                for a, n, b, m in zip(slot.offset, slot.shape, piece.offsets, piece.sizes, strict=True)
            ]
            if any(start >= end for start, end in zip(starts, ends, strict=True)):
                continue
            value = self._tensor(MetadataIndex(slot.key, piece.offsets))
            if tuple(value.shape) != tuple(piece.sizes):
                raise ConversionError(f"{self.path}: {slot.key}: a piece has shape {tuple(value.shape)}")
            source = _window(value, starts, ends, piece.offsets)
            if source.shape == slot.shape:
                return source
            if result is None:
                result = torch.empty(slot.shape, dtype=value.dtype)
            _window(result, starts, ends, slot.offset).copy_(source)
            missing -= source.numel()
        if result is None or missing:
            raise ConversionError(f"{self.path}: {slot.key}: {missing} elements of {slot} were never saved")
        return result

    def _overlapping(self, slot: Slot) -> list[ChunkStorageMetadata]:
        """Pieces that share the slot's first index; there may be hundreds of others."""
        if slot.key not in self._pieces:
            by_first: dict[int, list[ChunkStorageMetadata]] = defaultdict(list)
            pieces = self.tensors[slot.key].chunks
            if slot.shape[0] != 1:
                by_first[-1] = list(pieces)
            else:
                for piece in pieces:
                    for first in range(piece.offsets[0], piece.offsets[0] + piece.sizes[0]):
                        by_first[first].append(piece)
            self._pieces[slot.key] = by_first
        by_first = self._pieces[slot.key]
        return by_first.get(-1) or by_first.get(slot.offset[0], [])

    def _tensor(self, index: MetadataIndex) -> Tensor:
        """A piece, its data in the mapped file: reading would copy it into new memory."""
        header = self._load(index, map_location="meta")
        info, storage = self._storage[index], header.untyped_storage()
        begin, length = getattr(storage, "_checkpoint_offset", None), storage.nbytes()
        if begin is None:  # versions of torch that do not tell
            return self._load(index)
        if begin + length > info.length:
            raise ConversionError(f"{self.path / info.relative_path}: {index.fqn}: corrupt")
        if not length:
            return torch.empty(header.shape, dtype=header.dtype)
        raw = torch.frombuffer(
            self._map(info.relative_path), dtype=torch.uint8, count=length, offset=info.offset + begin
        )
        if raw.data_ptr() % header.dtype.itemsize:  # pieces follow each other without padding
            raw = raw.clone()
        return raw.view(header.dtype).as_strided(header.shape, header.stride(), header.storage_offset())

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self.path / file).open("rb") as handle:
                # Private, so that torch may see it as writable memory; nothing is written.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _load(self, index: MetadataIndex, map_location: str = "cpu", pickle_module: Any = None) -> Any:
        info = self._storage.get(index)
        if info is None:
            raise ConversionError(f"{self.path}: {index.fqn}: no file has the piece at {index.offset}")
        try:
            view = cast(IO[bytes], _Window(self._map(info.relative_path), info.offset, info.length))
            safe = pickle_module is None
            return torch.load(view, map_location=map_location, weights_only=safe, pickle_module=pickle_module)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            path = self.path / info.relative_path
            raise ConversionError(f"{path}: {index.fqn} at byte {info.offset}: {error}") from error


class _Window(io.RawIOBase):
    """A part of a mapped file as a file; without system calls, at which threads would wait for each other."""

    def __init__(self, data: mmap.mmap, offset: int, length: int):
        self._data, self._begin, self._length, self._position = data, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), self._length - self._position))
        begin = self._begin + self._position
        target[:count] = self._data[begin : begin + count]
        self._position += count
        return count


def _window(tensor: Tensor, starts: list[int], ends: list[int], origin: Any) -> Tensor:
    """The part of a tensor that lies between global positions, where its own first element is at `origin`."""
    for dim, (start, end, first) in enumerate(zip(starts, ends, origin, strict=True)):
        tensor = tensor.narrow(dim, start - first, end - start)
    return tensor
