"""Megatron `torch_dist` checkpoint, saved in any layout → Hugging Face directory, tensor by tensor, shard by shard."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.blocks import quantized, restored, scale_shape
from dsv3_megatron.convert.dist_checkpoint import DistCheckpoint
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_directory import CONFIG, INDEX, SCALE
from dsv3_megatron.convert.inventory import Slot, Weight, duplicates, is_quantized, weights
from dsv3_megatron.convert.output import WORKERS, PartialOutput
from dsv3_megatron.convert.progress import Progress
from dsv3_megatron.convert.release_files import (
    GENERATION_CONFIG,
    carry_over,
    generation_config,
    with_token_ids,
)
from dsv3_megatron.convert.safetensors_file import header_of, write_tensor
from dsv3_megatron.convert.to_megatron import HF_FILES
from dsv3_megatron.data.tokenizer_files import TokenizerError, read_json, without_paths
from dsv3_megatron.fp8.tiles import ceil_to_power_of_two

__all__ = ["MegatronWeights", "megatron_to_hf"]

SHARD_SIZE = 5_000_000_000  # bytes; about what the release has
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_NOT_WEIGHTS = ("optimizer.", "ema.")  # what a trainer saves besides the model
_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def megatron_to_hf(
    source: Path,
    output: Path,
    dtype: str = "keep",
    hf_files: Path | None = None,
    workers: int = WORKERS,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Convert, or go on with an interrupted conversion.

    Args:
        source: what `--save` or `hf_to_megatron` wrote; the newest iteration is taken.
        output: folder to be made; it must not exist.
        dtype: of the weights: "keep", "bf16", "fp32", or "fp8" with `weight_scale_inv`. Routers' biases are fp32.
        hf_files: folder whose config.json, tokenizer and chat template are carried over, nothing else; by default
            those that `hf_to_megatron` left in `source`, else those of `--tokenizer-model` of the training.
        workers: shards written at the same time.
        shard_size: bytes of tensors in a shard.

    Raises:
        ConversionError: names the file and tensor that are wrong, or what could not be written.
    """
    _ToHF(MegatronWeights(source), output, dtype, hf_files, shard_size).run(workers)


class MegatronWeights:
    """The model in a Megatron checkpoint by released names; optimizer state and averages are not looked at.

    Attributes:
        checkpoint: the files.
        arguments: Megatron's arguments of the run that saved it.
        architecture: what arguments and tensors say.
        weights: every tensor of the model by released name.

    Raises:
        ConversionError: a tensor is missing, has another shape, or is left over.
    """

    def __init__(self, folder: Path):
        self.checkpoint = DistCheckpoint(folder)
        self.arguments = self.checkpoint.arguments()
        keys = self.checkpoint.tensors
        if "embedding.word_embeddings.weight" not in keys:
            raise ConversionError(f"{self.checkpoint.path}: embedding.word_embeddings.weight is missing")
        depths = {int(key.split(".")[2]) for key in keys if key.startswith("mtp.layers.")}
        vocab_size = keys["embedding.word_embeddings.weight"].size[0]
        self.architecture = Architecture.from_megatron(self.arguments, vocab_size, len(depths))
        self.weights = {weight.name: weight for weight in weights(self.architecture)}
        used = set()
        for weight in self.weights.values():
            self.checkpoint.check(weight.slot)
            used.add(self.checkpoint.locate(weight.slot).key)
        left = sorted(
            key for key in keys.keys() - used if not key.startswith(_NOT_WEIGHTS) and not self._is_scale(key)
        )
        if left:
            raise ConversionError(
                f"{self.checkpoint.path}: {left[0]} (of {len(left)}) is no tensor of the model"
            )

    def _is_scale(self, key: str) -> bool:
        return key.endswith(SCALE) and key.removesuffix(SCALE) in self.weights

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(self.weights[name].slot)

    def tensor(self, name: str) -> Tensor:
        """A tensor in its released shape."""
        weight = self.weights[name]
        return self.checkpoint.read(weight.slot).view(weight.shape)

    def scale(self, name: str) -> Tensor | None:
        """The scale with which an FP8 release had this weight, where the checkpoint comes from one."""
        key = name + SCALE
        if key not in self.checkpoint.tensors:
            return None
        shape = tuple(self.checkpoint.tensors[key].size)
        return self.checkpoint.read(Slot(key, shape, (0,) * len(shape), shape))


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the output: its name and dtype there, and the released name of the weight it is (a copy of)."""

    name: str
    weight: Weight
    dtype: torch.dtype

    @property
    def has_scale(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    def rows(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of the tensor and of its scale."""
        yield self.name, self.dtype, self.weight.shape
        if self.has_scale:
            yield self.name + SCALE, torch.float32, scale_shape(self.weight.shape)

    @property
    def num_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in self.rows())


class _ToHF:
    def __init__(
        self, source: MegatronWeights, output: Path, dtype: str, hf_files: Path | None, shard_size: int
    ):
        self.source, self.dtype = source, _DTYPES.get(dtype)
        if hf_files is not None and not hf_files.is_dir():
            raise ConversionError(f"--hf-files {hf_files}: no such folder")
        self.hf_files = hf_files or self._files_of_source()
        kept = self._kept_config(asked=hf_files is not None)
        # V3.1's scales are powers of two, which its readers rely on.
        quantization = kept.get("quantization_config")
        scale_fmt = quantization.get("scale_fmt") if isinstance(quantization, dict) else None
        self.powers_of_two = scale_fmt == "ue8m0" and self.dtype == torch.float8_e4m3fn
        self.config = self._config(kept)
        shards = _packed(self._tensors(), shard_size)
        self.shards = {
            f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
            for number, shard in enumerate(shards, 1)
        }
        checkpoint = source.checkpoint.path
        stamp = (checkpoint / ".metadata").stat()
        job = {
            "from": str(checkpoint.resolve()),
            "saved": [stamp.st_mtime_ns, stamp.st_size],
            "dtype": dtype,
            "shard_size": shard_size,
            "powers_of_two": self.powers_of_two,
            "config": self.config,
        }
        self.output = PartialOutput(output, job)

    def run(self, workers: int) -> None:
        todo = [
            tensor
            for file, shard in self.shards.items()
            if self.output.record(file) is None
            for tensor in shard
        ]
        total = sum(tensor.num_bytes for tensor in todo)
        self.output.check_space(total)
        self.progress = Progress("megatron-to-hf", total)
        with self.output:
            self.output.run(list(self.shards), self._convert, workers)
            self.progress.close()
            if self.hf_files is not None:
                carry_over(self.hf_files, self.output.data)
            self._write_json(INDEX, self._index())
            self._write_json(CONFIG, self.config)
            self._write_json(GENERATION_CONFIG, generation_config(self.config, self.hf_files))
            self.output.finish()

    def _tensors(self) -> list[_Tensor]:
        """Every tensor of the output in the order of the release, the copies of an MTP layer at its end."""
        source = self.source
        tensors = [_Tensor(name, weight, self._dtype_of(weight)) for name, weight in source.weights.items()]
        for copy, original in duplicates(source.architecture).items():
            weight = source.weights[original]
            tensors.append(_Tensor(copy, weight, self._dtype_of(weight)))
        return tensors

    def _dtype_of(self, weight: Weight) -> torch.dtype:
        if weight.keeps_fp32:
            return torch.float32
        stored = self.source.dtype(weight.name)
        if self.dtype == torch.float8_e4m3fn and not is_quantized(weight.name):
            return torch.bfloat16
        return self.dtype or stored

    def _convert(self, file: str) -> None:
        self.output.write_part(file, lambda handle: self._write_shard(file, handle))

    def _write_shard(self, file: str, handle: BinaryIO) -> int:
        shard = self.shards[file]
        header = header_of(row for tensor in shard for row in tensor.rows())
        for tensor in shard:
            with self.output.tensor(file, tensor.name):
                if tensor is shard[0]:
                    handle.write(header)
                self._write_tensor(tensor, handle)
                handle.flush()  # so that a full disk is found here, where the tensor is known
            self.progress.add(tensor.num_bytes)
        return len(shard)

    def _write_tensor(self, tensor: _Tensor, handle: BinaryIO) -> None:
        for value in self._values(tensor):
            write_tensor(handle, value)

    def _values(self, tensor: _Tensor) -> tuple[Tensor, ...]:
        """A tensor's data, and its scale."""
        value = self.source.tensor(tensor.weight.name)
        if not tensor.has_scale:
            return (value.to(tensor.dtype),)
        scale = self.source.scale(tensor.weight.name)
        if scale is not None and self.powers_of_two and not torch.equal(scale, ceil_to_power_of_two(scale)):
            scale = None
        q = None if scale is None else restored(value, scale)
        return quantized(value, self.powers_of_two) if q is None or scale is None else (q, scale)

    def _index(self) -> dict[str, Any]:
        weight_map = {
            row[0]: file for file, shard in self.shards.items() for tensor in shard for row in tensor.rows()
        }
        total = sum(tensor.num_bytes for shard in self.shards.values() for tensor in shard)
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    def _kept_config(self, asked: bool) -> dict[str, Any]:
        """config.json of `hf_files`, empty without one; of a folder that nobody named it may be another model's."""
        if self.hf_files is None:
            return {}
        try:
            config = read_json(self.hf_files / CONFIG) or {}
            if config:
                Architecture.from_hf(config, self.source.architecture.mtp_num_layers)
            return config
        except (TokenizerError, ConversionError) as error:
            if asked:
                raise ConversionError(f"--hf-files {self.hf_files}: {error}") from error
            print(f"megatron-to-hf: {self.hf_files / CONFIG} is not taken: {error}", file=sys.stderr)
            return {}

    def _config(self, kept: dict[str, Any]) -> dict[str, Any]:
        """config.json: that of the source where there is one, corrected by what the weights are."""
        arch, config = self.source.architecture, without_paths(kept)
        described = Architecture.from_hf(config, arch.mtp_num_layers) if config else None
        if described != arch:
            if described is not None:
                differ = [name for name, value in vars(arch).items() if getattr(described, name) != value]
                print(
                    f"megatron-to-hf: {self.hf_files} describes another model than the checkpoint has "
                    f"({', '.join(differ)}): config.json is corrected",
                    file=sys.stderr,
                )
            for key in ("rope_parameters", "rope_scaling", "rope_theta"):
                config.pop(key, None)
            config |= arch.to_hf(config.get("model_type"))
        if arch.mtp_num_layers or "num_nextn_predict_layers" in config:
            config["num_nextn_predict_layers"] = arch.mtp_num_layers
        config.pop("quantization_config", None)
        dtype = self._dtype_of(next(iter(self.source.weights.values())))
        if self.dtype == torch.float8_e4m3fn:
            scale_fmt = {"scale_fmt": "ue8m0"} if self.powers_of_two else {}
            config["quantization_config"] = _QUANTIZATION | scale_fmt
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        config.pop("dtype", None)
        return with_token_ids(config, self.hf_files, arch.vocab_size)

    def _files_of_source(self) -> Path | None:
        """Where config.json and tokenizer are when nobody says."""
        for folder in (self.source.checkpoint.path.parent / HF_FILES, self._tokenizer_of_training()):
            if folder is not None and folder.is_dir():
                return folder
        return None

    def _tokenizer_of_training(self) -> Path | None:
        name = getattr(self.source.arguments, "tokenizer_model", None)
        return Path(name) if name else None

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        self.output.write_part(name, lambda file: file.write(text.encode()))


def _packed(tensors: list[_Tensor], shard_size: int) -> list[list[_Tensor]]:
    """Shards of at most `shard_size` bytes, except where a single tensor is larger."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards
