"""transformers 5's files with the experts of a layer in one tensor, as the per-expert tensors of the release.

`experts.gate_up_proj` is [E, 2·I, H] with the gate's rows first, `experts.down_proj` [E, H, I]; FP8 has
`…_scale_inv` of that shape in blocks. Each expert's matrix lies in one piece of the file, so it is read as if it were a
tensor of its own.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.safetensors_file import Entry
from dsv3_megatron.fp8.tiles import TILE

__all__ = ["unfused"]

_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def unfused(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries with each fused one replaced by those of its experts.

    Raises:
        ConversionError: a fused tensor has not three dimensions, or its rows do not divide.
    """
    for entry in entries:
        match = _FUSED.fullmatch(entry.name)
        if match is None:
            yield entry
            continue
        prefix, kind, scale = match.groups()
        parts = _PARTS[kind]
        if len(entry.shape) != 3 or entry.shape[1] % len(parts):
            raise ConversionError(
                f"{entry.name}: shape {entry.shape}, but fused experts are [experts, rows, columns] with the rows of "
                f"{' and '.join(parts)}; save the model with separate experts (transformers: save_original_format=True)"
            )
        experts, rows, columns = entry.shape
        rows //= len(parts)
        if entry.dtype == torch.float8_e4m3fn and len(parts) > 1 and rows % TILE:
            raise ConversionError(
                f"{entry.name}: FP8 with {rows} rows of {parts[0]}: a block of {TILE} rows, which has one scale, "
                f"reaches into {parts[1]}; convert the files to bf16 first"
            )
        size = rows * columns * entry.dtype.itemsize
        for expert in range(experts):
            for number, part in enumerate(parts):
                start = entry.start + (expert * len(parts) + number) * size
                name = f"{prefix}.{expert}.{part}.weight{scale or ''}"
                yield replace(entry, name=name, shape=(rows, columns), start=start, end=start + size)
