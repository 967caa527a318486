"""Tokens that join punctuation and line breaks: which they are, how often they are split, and that no text changes."""

import random

import pytest

from dsv3_megatron.data.documents import Piece
from dsv3_megatron.data.encode import EncodeSettings, encode_shard, shard_documents
from dsv3_megatron.data.punctuation import merged_tokens, split_at_random
from dsv3_megatron.data.vocabulary import DocumentEncoder, save_tokenizer, train_tokenizer

TEXT = "def f(x):\n    return g(x);\n\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([TEXT], 330), path)
    return path


def test_which_tokens() -> None:
    texts = {1: "):\n", 2: " .\r\n\n", 3: "\n", 4: ");", 5: "x\n", 6: " \n", 7: "。\n", 8: "€\n"}
    assert merged_tokens(texts, lambda text: [ord(c) for c in text]) == {
        1: [41, 58, 10],
        2: [32, 46, 13, 10, 10],
        7: [ord("。"), 10],
        8: [ord("€"), 10],
    }


def test_parts_decode_to_the_token(folder) -> None:
    encoder = DocumentEncoder(folder)
    parts = encoder.merged_punctuation
    assert "):\n" in {encoder.decode([token]) for token in parts}
    for token, ids in parts.items():
        assert len(ids) >= 2 and encoder.decode(ids) == encoder.decode([token])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_rate(rate: float) -> None:
    ids = [7, 8] * 5000
    split = split_at_random(ids, {7: [1, 2]}, rate, random.Random(0))
    assert split.count(8) == 5000 and split.count(1) == split.count(2) == 5000 - split.count(7)
    # five standard deviations of a binomial
    assert abs(split.count(1) - 5000 * rate) <= 5 * (5000 * rate * (1 - rate)) ** 0.5


def documents(folder, tmp_path, name: str, **settings) -> tuple[list[list[int]], list[list[int]]]:
    texts = [f"{i}{TEXT}" for i in range(20)]
    pieces = []
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.txt"
        path.write_text(text)
        pieces.append(Piece(str(path), 0, len(text)))
    encode_shard(
        pieces, folder, tmp_path / f"{name}.npz", EncodeSettings(fim_rate=0.5, valid_fraction=0.3, **settings)
    )
    train, valid = (
        [ids.tolist() for ids in shard_documents(tmp_path / f"{name}.npz", s)] for s in ("train", "valid")
    )
    return train, valid


def test_prepared_documents(folder, tmp_path) -> None:
    """Training documents are split, the same ones each time, and keep their text; held-out ones stay as they are."""
    encoder = DocumentEncoder(folder)
    plain, held_out = documents(folder, tmp_path, "plain", split_rate=0.0)
    split, held_out_too = documents(folder, tmp_path, "split", split_rate=0.5)
    again, _ = documents(folder, tmp_path, "again", split_rate=0.5)
    other, _ = documents(folder, tmp_path, "other", split_rate=0.5, seed=7)
    assert split == again and split != other and held_out == held_out_too and held_out
    merged = sum(token in encoder.merged_punctuation for ids in plain for token in ids)
    left = sum(token in encoder.merged_punctuation for ids in split for token in ids)
    assert merged > 500 and 0.4 < left / merged < 0.6
    assert [encoder.decode(ids) for ids in split] == [encoder.decode(ids) for ids in plain]
