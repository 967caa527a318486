"""The embedding's rows and the tokenizer are the checkpoint's; rounding up may differ with tensor parallelism."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.arguments import megatron_parser
from dsv3_megatron.checkpoint import vocabulary
from tests.checkpoint.fake import arguments, write
from tests.checkpoint.test_model import refusal


@pytest.fixture(scope="module")
def parser() -> Any:
    return megatron_parser()


def null(tokens: int, tp: int = 1, padded: int | None = None) -> Namespace:
    args = Namespace(tokenizer_type="NullTokenizer", vocab_size=tokens, tensor_model_parallel_size=tp)
    args.padded_vocab_size = padded if padded is not None else vocabulary.rows(args)
    return args


def now(tokens: int, tp: int = 1, padded: int | None = None) -> Namespace:
    args = null(tokens, tp)
    args.padded_vocab_size = padded
    return args


@pytest.mark.parametrize(
    ("recorded", "args", "text"),
    [
        (null(256), now(256), None),
        (null(300), now(300, tp=2), None),  # 384 rows, and 512
        (null(300, tp=2), now(300), None),
        (null(256), now(512), "--vocab-size 256 (this run: 512)"),
        (null(250), now(256), "--vocab-size 250 (this run: 256)"),
        (null(256), now(256, padded=1024), "--padded-vocab-size 256 rows (this run: 1024 rows)"),
        (null(256, padded=1024), now(256), "--vocab-size 1024 rows (this run: 256 rows)"),
        (Namespace(padded_vocab_size=96), now(96, padded=96), None),  # converted
        (Namespace(padded_vocab_size=96), now(96), "--padded-vocab-size 96 rows (this run: 128 rows)"),
        (Namespace(), now(96), None),
    ],
)
def test_null_tokenizers(recorded: Namespace, args: Namespace, text: str | None) -> None:
    found = vocabulary.difference(recorded, args)
    assert (found and str(found)) == text


def test_tokens_are_counted_as_transformers_counts(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_dir))
    assert vocabulary.num_tokens(args) == len(AutoTokenizer.from_pretrained(tokenizer_dir))


def test_a_tokenizer_of_another_size(parser: Any, tmp_path: Path) -> None:
    recorded = arguments(parser)
    recorded.padded_vocab_size = 128
    saved = write(tmp_path / "saved", recorded)
    assert refusal(arguments(parser, f"--load {saved}")) == ""
    assert "--vocab-size 128 (this run: 512)" in refusal(
        arguments(parser, f"--load {saved} --vocab-size 512")
    )


def test_more_tokens_than_rows(parser: Any) -> None:
    text = refusal(arguments(parser, "--padded-vocab-size 64"))
    assert text.startswith("--padded-vocab-size 64: the tokenizer has more tokens than that (128)")
