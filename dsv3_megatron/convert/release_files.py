"""What goes into a Hugging Face directory beside the weights: only files of a list, since people publish such folders.

The list: config.json, generation_config.json, the tokenizer with its chat templates, and code that `auto_map` names.
Everything else that lies in the folder they come from (a corpus, checkpoints, logs, the original's README) stays there.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_directory import CONFIG
from dsv3_megatron.convert.output import naming
from dsv3_megatron.data.tokenizer_files import (
    TokenizerError,
    copy_files,
    read_json,
    remote_code,
    special_tokens,
    token_id,
    tokenizer_files,
)

__all__ = ["GENERATION_CONFIG", "carried_files", "carry_over", "generation_config", "with_token_ids"]

GENERATION_CONFIG = "generation_config.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_SHOWN = 5  # names of files left behind


def carried_files(folder: Path) -> list[str]:
    """Tokenizer, chat templates, and the code of config.json's `auto_map`; names relative to the folder."""
    try:
        return sorted({*tokenizer_files(folder), *remote_code(folder, CONFIG)})
    except TokenizerError as error:
        raise ConversionError(str(error)) from error


def carry_over(source: Path, target: Path, also: tuple[str, ...] = ()) -> None:
    """Copy what is on the list (and `also`), and say on stderr what stays behind."""
    names = [*carried_files(source), *(name for name in also if (source / name).is_file())]
    for name in names:
        with naming(target / name):
            copy_files(source, target, [name])
    known = {Path(name).parts[0] for name in (*names, CONFIG, GENERATION_CONFIG)}
    left = sorted(
        path.name for path in source.iterdir() if path.name not in known and not path.name.endswith(_WEIGHTS)
    )
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        print(
            f"{target}: only configuration, tokenizer and chat template are carried over from {source}; left there: "
            f"{', '.join(left[:_SHOWN])}{more}",
            file=sys.stderr,
        )


def with_token_ids(config: Mapping[str, Any], folder: Path | None, vocab_size: int) -> dict[str, Any]:
    """config.json with `bos_token_id`, `eos_token_id` and `pad_token_id`.

    Generation ends at every id that generation_config.json, config.json or the tokenizer names as the end; the
    beginning and padding are the tokenizer's. Where nothing is known they are null, as an absent key would be another
    token for transformers, and a line on stderr says so for the end.

    Raises:
        ConversionError: an id is none, or not in the model's vocabulary.
    """
    kept = {} if folder is None else _json(folder / GENERATION_CONFIG)
    tokens = _tokenizer_ids(folder)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        _check_ids(name, config.get(name), "config.json")
        _check_ids(name, kept.get(name), GENERATION_CONFIG)
    ends = _unique(kept.get("eos_token_id"), config.get("eos_token_id"), tokens.get("eos_token"))
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    for role in ("bos_token", "pad_token"):
        found = _unique(tokens.get(role), kept.get(f"{role}_id"), config.get(f"{role}_id"))
        ids[f"{role}_id"] = found[0] if found else None
    for name, value in ids.items():
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not 0 <= number < vocab_size:
                raise ConversionError(
                    f"--hf-files {folder}: {name} is {number}, and the model has {vocab_size} tokens: give the folder "
                    "of the tokenizer that it was trained with"
                )
    if not ends:
        print(
            "megatron-to-hf: no end-of-sequence token is known, so nothing will end a generation: give the tokenizer "
            "with --hf-files",
            file=sys.stderr,
        )
    return {**config, **ids}


def generation_config(config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """generation_config.json: the kept one, with the token ids of config.json."""
    kept = {} if folder is None else _json(folder / GENERATION_CONFIG)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {**kept, **{name: config[name] for name in names if config[name] is not None}}


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except TokenizerError as error:
        raise ConversionError(str(error)) from error


def _tokenizer_ids(folder: Path | None) -> dict[str, int | None]:
    if folder is None:
        return {}
    try:
        return {role: token_id(folder, token) for role, token in special_tokens(folder).items()}
    except TokenizerError as error:
        raise ConversionError(str(error)) from error


def _check_ids(name: str, value: Any, file: str) -> None:
    for number in value if isinstance(value, list) else [value]:
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise ConversionError(f"{file}: {name}={value!r}: a token id or a list of them is needed")


def _unique(*values: Any) -> list[int]:
    """Ids of single values and lists, each once, nulls left out."""
    flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(number for number in flat if number is not None))
