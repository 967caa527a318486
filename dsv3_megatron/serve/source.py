"""Where a model comes from: a Megatron checkpoint of any training layout, or a Hugging Face directory."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.hf_directory import HFDirectory
from dsv3_megatron.convert.to_hf import MegatronWeights
from dsv3_megatron.convert.to_megatron import HF_FILES
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.serve.tokenizer import TOKENIZER_FILE, Tokenizer

__all__ = ["Source", "open_source"]


@dataclass(frozen=True)
class Source:
    """A model on disk, opened and checked, not yet read.

    Attributes:
        folder: what the option named.
        architecture: sizes.
        hf: the directory, where it is one of Hugging Face.
        checkpoint: folder of the Megatron checkpoint, where it is one.
        tokenizer: None where there are no tokenizer files.
        ends: token ids that end an answer: generation_config.json, config.json and the tokenizer's own.
    """

    folder: Path
    architecture: Architecture
    hf: HFDirectory | None
    checkpoint: Path | None
    tokenizer: Tokenizer | None
    ends: tuple[int, ...]

    @property
    def decode(self) -> Callable[[list[int]], str] | None:
        """Ids to text without special tokens."""
        return None if self.tokenizer is None else self.tokenizer.decode

    def need_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer, or a `RefusedArgument` that says what needs it."""
        if self.tokenizer is None:
            raise RefusedArgument(
                f"{what} needs a tokenizer, and {self.folder} has none: give --tokenizer DIR with {TOKENIZER_FILE}"
            )
        return self.tokenizer


def open_source(load: Path | None, hf: Path | None, tokenizer: Path | None = None) -> Source:
    """Open `--load` or `--hf`.

    Args:
        load: folder of Megatron checkpoints (the newest is taken), or one of them.
        hf: Hugging Face directory.
        tokenizer: folder with tokenizer.json, if not the one that belongs to the model.

    Raises:
        RefusedArgument: neither or both are given, or one is not what it should be.
    """
    if (load is None) == (hf is None):
        raise RefusedArgument(
            "give --load DIR (a Megatron checkpoint) or --hf DIR (a Hugging Face directory)"
        )
    if tokenizer is not None and not (tokenizer / TOKENIZER_FILE).is_file():
        raise RefusedArgument(f"--tokenizer {tokenizer}: no {TOKENIZER_FILE} in it")
    if hf is not None:
        _check_folder("--hf", hf)
        if not (hf / "config.json").is_file():
            raise RefusedArgument(
                f"--hf {hf}: no config.json in it; a Megatron checkpoint is given with --load"
            )
        directory = HFDirectory(hf)
        return _source(hf, directory.architecture, directory, None, tokenizer or hf, hf)
    assert load is not None
    _check_folder("--load", load)
    weights = MegatronWeights(load)
    checkpoint = weights.checkpoint.path
    files = _files_of(checkpoint, weights.arguments)
    return _source(load, weights.architecture, None, checkpoint, tokenizer or files, files)


def _files_of(checkpoint: Path, arguments: Any) -> Path:
    """Folder of configuration and tokenizer: a conversion's, or the training's, also where its run has moved."""
    candidates = [checkpoint.parent / HF_FILES]
    if trained_with := getattr(arguments, "tokenizer_model", None):
        candidates.append(Path(trained_with))
        if saved_to := getattr(arguments, "save", None):
            candidates.append(checkpoint.parent / os.path.relpath(trained_with, saved_to))
    return next((folder for folder in candidates if folder.is_dir()), checkpoint)


def _check_folder(option: str, folder: Path) -> None:
    if not folder.is_dir():
        raise RefusedArgument(f"{option} {folder}: no such folder")


def _source(
    folder: Path,
    architecture: Architecture,
    hf: HFDirectory | None,
    checkpoint: Path | None,
    tokenizer_folder: Path,
    config_folder: Path,
) -> Source:
    tokenizer = None
    if (tokenizer_folder / TOKENIZER_FILE).exists():
        tokenizer = Tokenizer(tokenizer_folder)
        if tokenizer.vocab_size > architecture.vocab_size:
            raise RefusedArgument(
                f"--tokenizer {tokenizer_folder}: has ids up to {tokenizer.vocab_size - 1}, the vocabulary of {folder} "
                f"is {architecture.vocab_size}; give the model's own"
            )
    ends = [*_ids(config_folder / "generation_config.json"), *_ids(config_folder / "config.json")]
    if tokenizer is not None and tokenizer.eos_id is not None:
        ends.append(tokenizer.eos_id)
    return Source(folder, architecture, hf, checkpoint, tokenizer, tuple(dict.fromkeys(ends)))


def _ids(file: Path) -> list[int]:
    """eos_token_id of a configuration file: a number, a list, or nothing."""
    try:
        value: Any = json.loads(file.read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise RefusedArgument(f"{file}: eos_token_id {value!r}: must be a token id, or a list of them")
    return ids
