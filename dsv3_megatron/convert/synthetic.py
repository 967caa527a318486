"""A checkpoint of any size with made-up weights, in the form of the release: to measure conversions with.

python -m dsv3_megatron.convert.synthetic --output DIR --gigabytes 5 [--fp8]
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from dsv3_megatron.convert.architecture import Architecture, Yarn
from dsv3_megatron.convert.blocks import scale_shape
from dsv3_megatron.convert.hf_directory import CONFIG, INDEX, SCALE
from dsv3_megatron.convert.inventory import duplicates, is_quantized, weights
from dsv3_megatron.convert.safetensors_file import header_of

__all__ = ["synthetic_release"]

Row = tuple[str, torch.dtype, tuple[int, ...]]
_SHARD = 500_000_000  # bytes


def synthetic_release(folder: Path, num_bytes: float, fp8: bool = False) -> Architecture:
    """Write a directory of about `num_bytes`, at least 4.5e9 in bf16: tensors as wide as V3's, a small vocabulary, 8
    experts in a layer, MTP, and as many layers as that takes.
    """
    arch = _of_size(num_bytes, fp8)
    rows = list(_rows(arch, fp8))
    folder.mkdir(parents=True)
    shards: list[list[Row]] = [[]]
    for row in rows:
        if sum(map(_size, shards[-1])) + _size(row) > _SHARD and shards[-1]:
            shards.append([])
        shards[-1].append(row)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        weight_map |= {row[0]: name for row in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / CONFIG).write_text(json.dumps(arch.to_hf()))
    return arch


def _of_size(num_bytes: float, fp8: bool) -> Architecture:
    layers = 2
    while sum(map(_size, _rows(_architecture(layers + 1), fp8))) < num_bytes:
        layers += 1
    return _architecture(layers)


def _architecture(num_layers: int) -> Architecture:
    return Architecture(
        num_layers=num_layers,
        num_dense_layers=1,
        hidden_size=7168,
        ffn_hidden_size=18432,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
        num_experts=8,
        moe_ffn_hidden_size=2048,
        num_shared_experts=1,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        mtp_num_layers=1,
        vocab_size=16384,
        max_position_embeddings=163840,
        rotary_base=10000,
        layernorm_epsilon=1e-6,
        yarn=Yarn(40),
    )


def _rows(arch: Architecture, fp8: bool) -> Iterator[Row]:
    shapes = {}
    for weight in weights(arch):
        shapes[weight.name] = weight.shape
        if weight.keeps_fp32:
            yield weight.name, torch.float32, weight.shape
        elif fp8 and is_quantized(weight.name):
            yield weight.name, torch.float8_e4m3fn, weight.shape
            yield weight.name + SCALE, torch.float32, scale_shape(weight.shape)
        else:
            yield weight.name, torch.bfloat16, weight.shape
    for copy, original in duplicates(arch).items():
        yield copy, torch.bfloat16, shapes[original]


def _size(row: Row) -> int:
    return math.prod(row[2]) * row[1].itemsize


def _write(path: Path, rows: list[Row]) -> None:
    """Random bytes whose numbers are finite in every dtype; the same for names that end alike, so copies are equal."""
    with path.open("wb") as file:
        file.write(header_of(rows))
        for name, _, shape in rows:
            size = _size((name, _, shape))
            seed = 1 if name.endswith(("embed_tokens.weight", "head.weight")) else zlib.crc32(name.encode())
            generator = torch.Generator().manual_seed(seed)
            block = torch.randint(0, 60, (min(size, 1 << 22),), dtype=torch.uint8, generator=generator)
            data = memoryview(block.numpy())
            for start in range(0, size, len(data)):
                file.write(data[: size - start])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--fp8", action="store_true")
    options = parser.parse_args()
    arch = synthetic_release(options.output, options.gigabytes * 1e9, options.fp8)
    print(f"{options.output}: {arch.num_layers} layers")


if __name__ == "__main__":
    main()
