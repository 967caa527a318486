"""One shard of documents to token ids: the work of one process, kept in one file so that it need not be done
again."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.documents import Piece, document_id, is_validation, read_piece
from dsv3_megatron.data.fim import document_tokens, fim_cuts
from dsv3_megatron.data.punctuation import split_at_random
from dsv3_megatron.data.vocabulary import DocumentEncoder
from dsv3_megatron.files import whole

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class EncodeSettings:
    """What decides the token ids of a document, apart from its text and the tokenizer."""

    json_key: str = "text"
    valid_fraction: float = 0.05
    fim_rate: float = 0.1
    split_rate: float = 0.1  # of tokens that join punctuation and line breaks; unpublished
    seed: int = 1234


@dataclass
class Counts:
    """Totals over documents; added up over shards."""

    train_documents: int = 0
    valid_documents: int = 0
    fim_documents: int = 0
    train_tokens: int = 0
    valid_tokens: int = 0

    def __iadd__(self, other: "Counts") -> "Counts":
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The dtype Megatron stores ids of this vocabulary in (`DType.optimal_dtype` of its indexed dataset)."""
    return np.uint16 if vocab_size < 65500 else np.int32


def encode_shard(
    pieces: Sequence[Piece], tokenizer_dir: Path, output: Path, settings: EncodeSettings
) -> Counts:
    """Encode the documents of a shard into `output` (.npz), complete or not at all; returns their totals.

    The file holds per split `{split}_tokens` [num tokens] and `{split}_lengths` [num documents], and the
    totals. Only training documents take the FIM form and have tokens split, so the validation loss means the same at
    each rate.
    """
    encoder = DocumentEncoder(tokenizer_dir)
    dtype = token_dtype(encoder.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    fim_documents = 0
    for piece in pieces:
        for text in read_piece(piece, settings.json_key):
            doc_id = document_id(text)
            held_out = is_validation(doc_id, settings.valid_fraction)
            cuts = None if held_out else fim_cuts(text, doc_id, settings.fim_rate, settings.seed)
            fim_documents += cuts is not None
            ids = document_tokens(text, cuts, encoder.encode, encoder.special_ids)
            if not held_out and settings.split_rate:
                rng = random.Random(b"split" + doc_id + settings.seed.to_bytes(8, "little"))
                ids = split_at_random(ids, encoder.merged_punctuation, settings.split_rate, rng)
            tokens["valid" if held_out else "train"].append(np.asarray(ids, dtype=dtype))
    arrays: dict[str, Any] = {}
    for split, documents in tokens.items():
        arrays[f"{split}_tokens"] = np.concatenate([np.empty(0, dtype), *documents])
        arrays[f"{split}_lengths"] = np.asarray([len(ids) for ids in documents], dtype=np.int64)
    counts = Counts(
        train_documents=len(tokens["train"]),
        valid_documents=len(tokens["valid"]),
        fim_documents=fim_documents,
        train_tokens=arrays["train_tokens"].size,
        valid_tokens=arrays["valid_tokens"].size,
    )
    arrays["counts"] = np.asarray(list(asdict(counts).values()), dtype=np.int64)
    with whole(output) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **arrays)
    return counts


def shard_counts(path: Path) -> Counts:
    """Totals of a shard file written by `encode_shard`."""
    with np.load(path) as shard:
        return Counts(*shard["counts"].tolist())


def shard_documents(path: Path, split: str) -> list[np.ndarray]:
    """Token ids of each document of `split` in a shard file."""
    with np.load(path) as shard:
        lengths, tokens = shard[f"{split}_lengths"], shard[f"{split}_tokens"]
    return np.split(tokens, np.cumsum(lengths)[:-1]) if lengths.size else []
