"""Prompts from a JSONL file: `{"prompt": text or messages}` or `{"tokens": [ids]}` in each line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.inference.text import json_value
from dsv3_megatron.serve.source import Source

__all__ = ["Prompt", "read_prompts"]


@dataclass(frozen=True)
class Prompt:
    """A line: the prompt as it was given, its token ids, and the keys that the caller asked for beside them.

    Messages are rendered by the tokenizer's chat template, up to where the answer begins.
    """

    given: str | list[int] | list[dict[str, Any]]
    tokens: list[int]
    also: dict[str, Any] = field(default_factory=dict)


def read_prompts(file: Path, source: Source, max_length: int, also: Sequence[str] = ()) -> list[Prompt]:
    """All prompts, checked.

    Args:
        max_length: tokens of prompt and answer together; at least one token of it is the answer's.
        also: further keys that a line may have, kept with its prompt.

    Raises:
        RefusedArgument: names file and line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedArgument(f"--prompts {file}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(line, source, max_length, also))
        except ValueError as error:
            raise RefusedArgument(f"{file}:{number}: {error}") from error
    if not prompts:
        raise RefusedArgument(f"--prompts {file}: no prompts")
    return prompts


def _prompt(line: str, source: Source, max_length: int, also: Sequence[str]) -> Prompt:
    try:
        value: Any = json_value(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict) or len(value.keys() & {"prompt", "tokens"}) != 1:
        raise ValueError('give {"prompt": text or messages} or {"tokens": [ids]}')
    if others := sorted(value.keys() - {"prompt", "tokens", *also}):
        raise ValueError(
            f'{others[0]!r} would do nothing: give {{"prompt": text or messages}} or {{"tokens": [ids]}} alone'
        )
    if "tokens" in value:
        given: Any = value["tokens"]
        tokens = _checked_ids(value["tokens"], source.architecture.vocab_size)
    else:
        given = value["prompt"]
        tokenizer = source.need_tokenizer('{"prompt": text}')
        if isinstance(given, list) and given:
            tokens = tokenizer.chat(given)
        elif isinstance(given, str):
            tokens = tokenizer.encode(given)
        else:
            kind = "an empty list" if given == [] else type(given).__name__
            raise ValueError(f"prompt must be a text or messages, not {kind}")
    if not tokens:
        raise ValueError("the prompt is empty: give at least one token")
    if len(tokens) >= max_length:
        raise ValueError(f"{len(tokens)} tokens leave no room for an answer in --max-length {max_length}")
    return Prompt(given, tokens, {key: value[key] for key in also if key in value})


def _checked_ids(ids: Any, vocab_size: int) -> list[int]:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError("tokens must be a list of whole numbers")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {token} is not in the vocabulary of {vocab_size}")
    return ids
