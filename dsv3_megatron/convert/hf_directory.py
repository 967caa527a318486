"""A Hugging Face directory of a DeepSeek-V3: which tensors it has, checked to be exactly the model's, and their values.

FP8 weights come with `weight_scale_inv`, one fp32 factor per 128×128 block (multiply, despite the name); the last
blocks of a dimension may be smaller.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.blocks import dequantized, scale_shape
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.fused_experts import unfused
from dsv3_megatron.convert.inventory import Weight, duplicates, weights
from dsv3_megatron.convert.safetensors_file import Entry, SafetensorsFile

__all__ = ["CONFIG", "INDEX", "SCALE", "HFDirectory"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE = "_scale_inv"
FP8 = torch.float8_e4m3fn
# quantization_config as released: possible values, the first one also where the key is absent.
_QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "weight_block_size": ([128, 128],),
    "scale_fmt": (None, "ue8m0"),  # V3.1: scales are powers of two, in fp32 all the same
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class HFDirectory:
    """Opens all shards and checks names, shapes and dtypes; reads no data yet.

    Attributes:
        config: contents of config.json.
        architecture: what config.json and the tensors say; MTP layers are those that have tensors.
        files: the shards by file name.
        weights: every tensor of the model by released name, without scales and MTP's copies.
        copies: name of each copy of embedding or head that the directory has → name of the original.

    Raises:
        ConversionError: names the file and the tensor that are wrong.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = _json(folder / CONFIG)
        self.files, self._file_of = _open_shards(folder)
        layers = [int(match[1]) for name in self._file_of if (match := _LAYER.match(name))]
        extra = max(layers, default=0) + 1 - int(self.config.get("num_hidden_layers", 0))
        self.architecture = Architecture.from_hf(self.config, mtp_num_layers=max(0, extra))
        self.weights = {weight.name: weight for weight in weights(self.architecture)}
        self.copies = {
            copy: original
            for copy, original in duplicates(self.architecture).items()
            if copy in self._file_of
        }
        self._check_quantization()
        self._check()

    def file_of(self, name: str) -> SafetensorsFile:
        """The shard that has this tensor."""
        return self.files[self._file_of[name]]

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor."""
        return self.file_of(name).entries[name]

    def names_in(self, file: str) -> Iterator[str]:
        """Tensors of a shard in the order in which they lie there, scales left out."""
        entries = sorted(self.files[file].entries.values(), key=lambda entry: entry.start)
        return (entry.name for entry in entries if not entry.name.endswith(SCALE))

    def is_fp8(self, name: str) -> bool:
        return self.entry(name).dtype == FP8

    def stored(self, name: str) -> Tensor:
        """A tensor as it lies in the file."""
        return self.file_of(name).tensor(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor, FP8 multiplied out, in `dtype` (None: as stored, FP8 as bf16)."""
        value = self.stored(name)
        if self.is_fp8(name):
            return dequantized(value, self.stored(name + SCALE), dtype or torch.bfloat16)
        return value if dtype is None else value.to(dtype)

    def forget(self, name: str) -> None:
        """Let go of a tensor's pages."""
        self.file_of(name).forget(name)

    def _check_quantization(self) -> None:
        """What `weight_scale_inv` means follows from the values of these."""
        found = self.config.get("quantization_config") or {}
        if not isinstance(found, dict):
            raise ConversionError(
                f"{self.folder / CONFIG}: quantization_config={found!r}: an object is needed"
            )
        for key, values in _QUANTIZATION.items():
            value = found.get(key, values[0])
            if value not in values:
                raise ConversionError(
                    f"{self.folder / CONFIG}: quantization_config.{key}={value!r}; conversion reads "
                    f"{' or '.join(map(repr, values))}. Convert the files to bf16 first"
                )

    def _check(self) -> None:
        """Every tensor of the model is there, in its shape and a possible dtype, and nothing else."""
        unused = set(self._file_of)
        for name, weight in self.weights.items():
            if name not in unused:
                raise ConversionError(
                    f"{self.folder}: {name} is missing: no shard has it, but config.json describes a model with it"
                )
            unused -= self._check_tensor(name, weight)
        for copy, original in self.copies.items():
            unused -= self._check_tensor(copy, self.weights[original])
        if unused:
            names = sorted(unused)
            where = f"{self.folder / self._file_of[names[0]]}: {names[0]}"
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConversionError(f"{where} does not belong to the model that config.json describes{more}")

    def _check_tensor(self, name: str, weight: Weight) -> set[str]:
        """Check shape, dtype and scale; the names that are accounted for with that."""
        entry, where = self.entry(name), f"{self.file_of(name).path}: {name}"
        if entry.shape != weight.shape:
            raise ConversionError(f"{where}: shape {entry.shape}, but config.json describes {weight.shape}")
        if entry.dtype != FP8:
            return {name}
        scale = name + SCALE
        if scale not in self._file_of:
            raise ConversionError(f"{where}: FP8 without its scale: no shard has {scale}")
        found, wanted = self.entry(scale), scale_shape(weight.shape)
        if found.shape != wanted or found.dtype != torch.float32:
            raise ConversionError(
                f"{self.file_of(scale).path}: {scale}: {found.dtype} {found.shape}, but its weight of shape "
                f"{entry.shape} takes fp32 {wanted}"
            )
        return {name, scale}


def _open_shards(folder: Path) -> tuple[dict[str, SafetensorsFile], dict[str, str]]:
    """(shards by file name, file name by tensor name), the index checked against the shards."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ConversionError(f"{folder}: neither {INDEX} nor {SINGLE} is there")
        only = SafetensorsFile(folder / SINGLE)
        _split_experts(only)
        return {SINGLE: only}, dict.fromkeys(only.entries, SINGLE)
    listed = _json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict):
        raise ConversionError(f"{folder / INDEX}: no weight_map")
    files = {}
    for file in sorted(set(listed.values())):
        if not (folder / file).exists():
            tensor = next(name for name, at in listed.items() if at == file)
            raise ConversionError(f"{folder / file}: missing shard; {INDEX} has {tensor} there")
        files[file] = SafetensorsFile(folder / file)
        for name in files[file].entries:
            if listed.get(name) != file:
                raise ConversionError(
                    f"{folder / file}: {name} is there, but {INDEX} says {listed.get(name)}"
                )
    for name, file in listed.items():
        if name not in files[file].entries:
            raise ConversionError(f"{folder / file}: {name} is missing; {INDEX} has it there")
    file_of: dict[str, str] = {}
    for file, shard in files.items():
        _split_experts(shard)
        for name in shard.entries:
            if name in file_of:
                raise ConversionError(f"{folder / file}: {name} is there, and in {file_of[name]} too")
            file_of[name] = file
    return files, file_of


def _split_experts(file: SafetensorsFile) -> None:
    """Experts that lie together in one tensor become tensors of their own."""
    try:
        split = list(unfused(file.entries.values()))
    except ConversionError as error:
        raise ConversionError(f"{file.path}: {error}") from error
    file.entries = {entry.name: entry for entry in split}
    if len(file.entries) != len(split):
        raise ConversionError(f"{file.path}: an expert is there twice, by itself and fused with others")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{path}: corrupt JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: not a JSON object")
    return value
