"""Hugging Face directory → Megatron `torch_dist` checkpoint, tensor by tensor, one file per shard.

The checkpoint is a "release": the trainer takes its weights and starts at iteration 0, with any layout and schedule.
"""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.dist_checkpoint import COMMON, METADATA, RELEASE, TRACKER
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_directory import CONFIG, SCALE, HFDirectory
from dsv3_megatron.convert.inventory import extra_states
from dsv3_megatron.convert.output import WORKERS, PartialOutput
from dsv3_megatron.convert.progress import Progress
from dsv3_megatron.convert.release_files import GENERATION_CONFIG, carry_over

__all__ = ["HF_FILES", "hf_to_megatron"]

HF_FILES = "hf"  # folder of the output for what Hugging Face's directory has besides weights
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_OBJECTS = f"{RELEASE}/__objects.distcp"
_ALIGNMENT = 64  # of pieces in their file, so that their data can be used where it lies
_BLOCK = 1 << 24  # bytes compared at a time


def hf_to_megatron(source: Path, output: Path, dtype: str = "keep", workers: int = WORKERS) -> Architecture:
    """Convert, or go on with an interrupted conversion.

    Args:
        source: Hugging Face directory.
        output: folder for `--load`; it must not exist.
        dtype: "keep" (FP8 becomes bf16, as no Megatron checkpoint holds FP8 weights), "bf16" or "fp32".
        workers: shards converted at the same time.

    Raises:
        ConversionError: names the file and tensor that are wrong, or what could not be written.
    """
    return _ToMegatron(HFDirectory(source), output, dtype).run(workers)


class _ToMegatron:
    def __init__(self, source: HFDirectory, output: Path, dtype: str):
        self.source, self.arch = source, source.architecture
        self.dtype = _DTYPES.get(dtype)
        self.file_of = {
            f"{RELEASE}/__{number}_0.distcp": file for number, file in enumerate(sorted(source.files))
        }
        files = {name: [file.size, file.path.stat().st_mtime_ns] for name, file in source.files.items()}
        self.output = PartialOutput(
            output, {"from": str(source.folder.resolve()), "files": files, "dtype": dtype}
        )

    def run(self, workers: int) -> Architecture:
        waiting = [part for part in self.file_of if self.output.record(part) is None]
        todo = {part: sum(map(self._num_bytes, self._names(part))) for part in waiting}
        self.output.check_space(sum(todo.values()))
        self.progress = Progress("hf-to-megatron", sum(todo.values()))
        with self.output, _without_crc32():
            self.output.run(list(self.file_of), self._convert, workers)
            self.progress.close()
            self.output.write_part(_OBJECTS, self._write_objects)
            self._write_metadata()
            self._carry_over()
            self.output.finish()
        return self.arch

    def _names(self, part: str) -> list[str]:
        return list(self.source.names_in(self.file_of[part]))

    def _num_bytes(self, name: str) -> int:
        entry = self.source.entry(name)
        return 0 if name in self.source.copies else entry.numel * self._dtype_of(name).itemsize

    def _dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a tensor in the checkpoint."""
        if self.source.weights[name].keeps_fp32:
            return torch.float32
        stored = torch.bfloat16 if self.source.is_fp8(name) else self.source.entry(name).dtype
        return self.dtype or stored

    def _convert(self, part: str) -> None:
        self.output.write_part(part, lambda file: self._write_shard(part, file))

    def _write_shard(self, part: str, file: BinaryIO) -> list[dict[str, Any]]:
        """Write one shard's tensors; where each lies."""
        pieces = []
        for name in self._names(part):
            with self.output.tensor(part, name):
                if name in self.source.copies:
                    self._check_copy(name)
                    continue
                slot, dtype = self.source.weights[name].slot, self._dtype_of(name)
                value = self.source.tensor(name, dtype).view(slot.shape)
                pieces.append(_write(file, slot.key, value, slot.global_shape, slot.offset))
                if self.source.is_fp8(name):
                    # For the way back: what is not trained can be given back its own scales.
                    scale = self.source.stored(name + SCALE)
                    pieces.append(_write(file, name + SCALE, scale, tuple(scale.shape), (0, 0)))
                self.source.forget(name)
                file.flush()  # so that a full disk is found here, where the tensor is known
            self.progress.add(self._num_bytes(name))
        return pieces

    def _check_copy(self, copy: str) -> None:
        """A copy that an MTP layer carries must be what the model has once."""
        original = self.source.copies[copy]
        a, b = self.source.stored(copy), self.source.stored(original)
        same = a.dtype == b.dtype
        for start in range(0, a.numel() if same else 0, _BLOCK):
            block = slice(start, start + _BLOCK)
            same = same and torch.equal(_bits(a)[block], _bits(b)[block])
        if not same:
            raise ConversionError(
                f"{self.source.file_of(copy).path}: {copy} differs from {original}; DeepSeek-V3 shares them, and "
                "Megatron has one"
            )
        for name in (copy, original):
            self.source.forget(name)

    def _write_objects(self, file: BinaryIO) -> dict[str, list[int]]:
        """What is no tensor: the common state, and one empty extra state for everything that asks for it."""
        arguments = self.arch.namespace()
        arguments.tensor_model_parallel_size = arguments.pipeline_model_parallel_size = 1
        arguments.consumed_train_samples = arguments.consumed_valid_samples = 0
        arguments.model_from_checkpoint = (
            True  # a run that loads this has the release's sizes, unless it says otherwise
        )
        common = {
            "args": arguments,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": True},
        }
        places = {}
        for name, value in (("common", common), ("empty", None)):
            places[name] = [file.tell(), _save(file, [value])]
        return places

    def _write_metadata(self) -> None:
        """The files that make a checkpoint of the parts."""
        tensors: dict[str, TensorStorageMetadata] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for part in self.file_of:
            for piece in self.output.record(part):
                key, offset = piece["key"], torch.Size(piece["offset"])
                dtype = getattr(torch, piece["dtype"])
                if key not in tensors:
                    size = torch.Size(piece["global_shape"])
                    tensors[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [])
                if tensors[key].properties.dtype != dtype:
                    raise ConversionError(f"{self.source.folder}: the experts of {key} have different dtypes")
                tensors[key].chunks.append(ChunkStorageMetadata(offset, torch.Size(piece["shape"])))
                index = MetadataIndex(key, offset, len(tensors[key].chunks) - 1)
                storage[index] = _StorageInfo(Path(part).name, *piece["place"])
        objects = dict.fromkeys(extra_states(self.arch), "empty") | {COMMON: "common"}
        places = self.output.record(_OBJECTS)
        for key, kind in objects.items():
            storage[MetadataIndex(key)] = _StorageInfo(Path(_OBJECTS).name, *places[kind])
        entries = tensors | {key: BytesStorageMetadata() for key in objects}
        metadata = Metadata(state_dict_metadata=entries, storage_data=storage)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        self._write_file(f"{RELEASE}/{METADATA}", pickle.dumps(metadata))
        self._write_file(f"{RELEASE}/metadata.json", json.dumps(config).encode())
        self._write_file(TRACKER, RELEASE.encode())

    def _write_file(self, name: str, content: bytes) -> None:
        self.output.write_part(name, lambda file: file.write(content))

    def _carry_over(self) -> None:
        """Configuration and tokenizer: for the way back."""
        target = self.output.data / HF_FILES
        target.mkdir(exist_ok=True)
        carry_over(self.source.folder, target, also=(CONFIG, GENERATION_CONFIG))


def _write(
    file: BinaryIO, key: str, value: Tensor, global_shape: tuple[int, ...], offset: tuple[int, ...]
) -> dict[str, Any]:
    """Append one piece of a tensor; what the metadata has to say of it."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
    place = [file.tell(), _save(file, value)]
    return {
        "key": key,
        "dtype": str(value.dtype).removeprefix("torch."),
        "global_shape": global_shape,
        "offset": offset,
        "shape": list(value.shape),
        "place": place,
    }


@contextmanager
def _without_crc32() -> Iterator[None]:
    """`torch.save` as it is inside: nothing that reads a checkpoint looks at the checksums, a third of the work."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _save(file: BinaryIO, value: Any) -> int:
    """As torch's own checkpoint writer does; bytes written."""
    begin = file.tell()
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(
            error.__context__, OSError
        ):  # after a write that failed torch fails in words of its own
            raise error.__context__ from None
        raise
    return file.tell() - begin


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.itemsize])
