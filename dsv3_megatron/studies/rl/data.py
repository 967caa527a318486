"""What the arms of the demonstration train on: documents, prompts, demonstrations, pairs."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.encode import EncodeSettings, token_dtype
from dsv3_megatron.data.prepare import PrepareSettings
from dsv3_megatron.data.prepare import prepare as prepare_corpus
from dsv3_megatron.data.tokenizer_files import copy_files, tokenizer_files
from dsv3_megatron.data.vocabulary import (
    EOS,
    MIN_VOCAB_SIZE,
    DocumentEncoder,
    save_tokenizer,
    train_tokenizer,
)
from dsv3_megatron.files import whole, write_whole
from dsv3_megatron.posttrain import counting
from dsv3_megatron.posttrain.prepare import prepare as prepare_preferences
from dsv3_megatron.posttrain.prepare import read_preferences
from dsv3_megatron.sft.pack import pack
from dsv3_megatron.sft.prepare import REPORT_FILE, SPLITS

__all__ = ["write_corpus", "write_demonstrations", "write_pairs", "write_prompts"]


def write_corpus(folder: Path, count: int, seed: int) -> None:
    """The base model's documents, and a tokenizer of bytes; once."""
    source = folder.with_name("documents.jsonl")
    if not source.exists():
        _write_lines(source, ({"text": text} for text in counting.documents(count, seed)))
    tokenizer = folder.with_name("tokenizer")
    if not tokenizer.exists():
        with whole(tokenizer) as unfinished:
            unfinished.mkdir(exist_ok=True)
            # One token for each byte.
            save_tokenizer(train_tokenizer(["0123456789="], MIN_VOCAB_SIZE), unfinished)
    settings = PrepareSettings(
        vocab_size=None,
        tokenizer=str(tokenizer),
        encode=EncodeSettings(valid_fraction=0.01, split_rate=0.0),
        shard_bytes=1 << 20,
        format="jsonl",
    )
    prepare_corpus([source], folder, settings)


def write_prompts(file: Path, count: int, seed: int) -> None:
    """Training problems for `--prompt-data`."""
    lines = ({"prompt": p, "answer": a} for p, a in counting.problems(count, seed, held_out=False))
    _write_lines(file, lines)


def write_demonstrations(folder: Path, tokenizer: Path, count: int, seq_length: int, seed: int) -> None:
    """Rows of problems with their right answers for `--sft-data`, as plain text."""
    if (folder / REPORT_FILE).exists():
        return
    encoder = DocumentEncoder(tokenizer)
    end = encoder.special_ids[EOS]
    samples = []
    for prompt, answer in counting.problems(count, seed, held_out=False):
        before, after = [end, *encoder.encode(prompt)], [*encoder.encode(answer), end]
        samples.append(([*before, *after], [False] * len(before) + [True] * len(after)))
    rows = pack([len(ids) for ids, _ in samples], seq_length, seed)
    tokens = np.full((len(rows), seq_length), encoder.pad_id, token_dtype(encoder.vocab_size))
    answers = np.zeros(tokens.shape, bool)
    ends = np.full((len(rows), max(map(len, rows))), seq_length, np.int32)
    for row, members in enumerate(rows):
        at = 0
        for place, sample in enumerate(members):
            ids, learnt = samples[sample]
            tokens[row, at : at + len(ids)], answers[row, at : at + len(ids)] = ids, learnt
            at += len(ids)
            ends[row, place] = at
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("tokens", tokens), ("answers", answers), ("ends", ends)):
        np.save(folder / f"{SPLITS[0]}_{name}.npy", array)
    copy_files(tokenizer, folder, tokenizer_files(tokenizer))
    report = {"seq_length": seq_length, SPLITS[0]: {"rows": len(rows)}, SPLITS[1]: {"rows": 0}}
    (folder / REPORT_FILE).write_text(json.dumps(report) + "\n")


def write_pairs(folder: Path, tokenizer: Path, samples: Path, seq_length: int, seed: int) -> dict[str, Any]:
    """Pairs of a right and a wrong response of the base model to one problem, from the samples of this seed."""
    lines = []
    for text in samples.read_text().splitlines():
        record = json.loads(text)
        if record["seed"] != seed:
            continue
        prompt, answer = record["prompt"], record["answer"]
        right, wrong = _split(record["responses"], prompt, answer)
        lines += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in zip(right, wrong, strict=False)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = folder / "pairs.jsonl"
    _write_lines(source, lines)
    pairs = {"train": read_preferences([source]), "valid": []}
    return prepare_preferences(pairs, tokenizer, folder, seq_length, seed, text_begin="end")


def _split(responses: Sequence[str], prompt: str, answer: str) -> tuple[list[str], list[str]]:
    rewards = [counting.reward(prompt, text, answer) for text in responses]
    right = [text for text, reward in zip(responses, rewards, strict=True) if reward]
    return right, [text for text, reward in zip(responses, rewards, strict=True) if not reward]


def _write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
