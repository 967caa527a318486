"""Whether the tokens of this run are those of a checkpoint: rows of its embedding, size of the tokenizer."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.model import Difference

__all__ = ["difference", "num_tokens", "rows"]

NULL = "NullTokenizer"


def num_tokens(args: Namespace) -> int | None:
    """Tokens of the tokenizer that these arguments name; None where that is not known before it is built."""
    kind, path = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    if kind == NULL:
        return getattr(args, "vocab_size", None)
    if kind == "HuggingFaceTokenizer" and path is not None and (Path(path) / "tokenizer.json").is_file():
        return _num_tokens_of_file(Path(path)) + len(getattr(args, "special_tokens", None) or [])
    return None


def _num_tokens_of_file(folder: Path) -> int:
    """As `len()` of the tokenizer counts: its vocabulary and what `tokenizer_config.json` adds to it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = set(tokenizer.get_vocab(with_added_tokens=True))
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return len(names)
    for entry in (config.get("added_tokens_decoder") or {}).values():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            names.add(entry["content"])
    return len(names)


def rows(args: Namespace, tokens: int | None = None, like: Namespace | None = None) -> int | None:
    """Rows of the embedding: `--padded-vocab-size`, or the tokens rounded up as Megatron does.

    Args:
        tokens: of the tokenizer; `num_tokens(args)` when None.
        like: whose rounding (`--make-vocab-size-divisible-by` × tensor-parallel size) is taken; the arguments' own
            when None.
    """
    given = getattr(args, "padded_vocab_size", None)
    tokens = num_tokens(args) if tokens is None else tokens
    if given is not None:
        return given
    if tokens is None:
        return None
    rounding = like or args
    multiple = getattr(rounding, "make_vocab_size_divisible_by", 128) * getattr(
        rounding, "tensor_model_parallel_size", 1
    )
    return -(-tokens // multiple) * multiple


def difference(recorded: Namespace, args: Namespace) -> Difference | None:
    """How the vocabulary of a checkpoint and of this run differ; None where they do not, or where it is not known.

    Only the rounding up of the embedding's rows may differ: it follows tensor parallelism.
    """
    there, tokens = getattr(recorded, "padded_vocab_size", None), num_tokens(args)
    if there is None:
        return None
    null = getattr(recorded, "tokenizer_type", None) == NULL == getattr(args, "tokenizer_type", None)
    before: Any = getattr(recorded, "vocab_size", None)
    if null and before is not None and tokens is not None and before != tokens:
        return Difference("vocab_size", "--vocab-size", str(before), str(tokens), True)
    if getattr(args, "padded_vocab_size", None) is not None:
        here = args.padded_vocab_size
        return _of_rows("--padded-vocab-size", there, here) if here != there else None
    here = rows(args, tokens, like=recorded)
    if here is None or here == there:
        return None
    if tokens is not None and tokens <= there and not null:
        # The table has room for it, as the release's: what is missing is only to say how many rows there are.
        return _of_rows("--padded-vocab-size", there, here)
    return _of_rows(
        "--vocab-size" if getattr(args, "tokenizer_type", None) == NULL else "--tokenizer-model", there, here
    )


def _of_rows(option: str, before: int, now: int) -> Difference:
    return Difference("padded_vocab_size", option, f"{before} rows", f"{now} rows", True)
