"""Conversations (JSONL) to packed rows that `--sft-data` reads.

    python -m dsv3_megatron.sft.prepare --input chats.jsonl --tokenizer DIR --output-dir DIR --seq-length 4096

Each line is `{"messages": [{"role": "system"|"user"|"assistant", "content": text}, …]}`. The last line on stdout is one
JSON object, the report.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.documents import is_validation
from dsv3_megatron.data.encode import token_dtype
from dsv3_megatron.data.vocabulary import PAD, TOKENIZER_FILE, DocumentEncoder
from dsv3_megatron.sft.chat import BadConversation, check, conversation_tokens
from dsv3_megatron.sft.pack import pack

REPORT_FILE = "sft.json"
SPLITS = ("train", "valid")
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json")

Conversation = Sequence[Mapping[str, str]]
Sample = tuple[list[int], list[bool]]


def read_conversations(files: Sequence[Path]) -> list[Conversation]:
    """All conversations, checked.

    Raises:
        BadConversation: names file and line.
    """
    found: list[Conversation] = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                messages = json.loads(line)["messages"]
                check(messages)
            except (json.JSONDecodeError, KeyError, TypeError, BadConversation) as error:
                reason = "no key 'messages'" if isinstance(error, KeyError) else error
                raise BadConversation(f"{file}:{number}: {reason}") from error
            found.append(messages)
    if not found:
        raise BadConversation(f"--input {' '.join(map(str, files))}: no conversations")
    return found


def split(conversations: Sequence[Conversation], valid_fraction: float) -> dict[str, list[Conversation]]:
    """Train and held-out conversations, by a digest of their text."""
    parts: dict[str, list[Conversation]] = {name: [] for name in SPLITS}
    for messages in conversations:
        digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=16).digest()
        parts["valid" if is_validation(digest, valid_fraction) else "train"].append(messages)
    return parts


def prepare(
    conversations: Mapping[str, Sequence[Conversation]],
    tokenizer: Path,
    output_dir: Path,
    seq_length: int,
    seed: int = 1234,
) -> dict[str, Any]:
    """Write `{train,valid}_{tokens,answers,ends}.npy`, the tokenizer's files and, last, the report `sft.json`.

    `tokens` are ids [rows, seq_length], `answers` bool of that shape, `ends` int32 [rows, most samples in a row]: where
    each sample of a row ends, then seq_length. Conversations longer than a row are left out, and counted.

    Args:
        conversations: by "train" and "valid"; valid may be empty.

    Raises:
        BadConversation: all of a split are too long, or there is none to train on.
    """
    encoder = DocumentEncoder(tokenizer)
    samples: dict[str, list[Sample]] = {}
    too_long = 0
    for name in SPLITS:
        found = [
            conversation_tokens(messages, encoder.encode, encoder.special_ids)
            for messages in conversations[name]
        ]
        samples[name] = [sample for sample in found if len(sample[0]) <= seq_length]
        too_long += len(found) - len(samples[name])
        if not samples[name] and (name == "train" or found):
            raise BadConversation(
                f"no conversation is left for {name}: {len(found)} were given, all longer than --seq-length "
                f"{seq_length}"
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / REPORT_FILE).unlink(missing_ok=True)
    report: dict[str, Any] = {
        "seq_length": seq_length,
        "too_long": too_long,
        "vocab_size": encoder.vocab_size,
    }
    for name in SPLITS:
        rows = pack([len(ids) for ids, _ in samples[name]], seq_length, seed)
        _write_rows(output_dir, name, samples[name], rows, seq_length, encoder)
        tokens = sum(len(ids) for ids, _ in samples[name])
        report[name] = {
            "conversations": len(samples[name]),
            "rows": len(rows),
            "tokens": tokens,
            "answer_tokens": sum(sum(answer) for _, answer in samples[name]),
            "filled": round(tokens / max(len(rows) * seq_length, 1), 4),
        }
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, output_dir / name)
    unfinished = output_dir / (REPORT_FILE + ".part")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(unfinished, output_dir / REPORT_FILE)
    return report


def _write_rows(
    folder: Path,
    split: str,
    samples: Sequence[Sample],
    rows: Sequence[Sequence[int]],
    seq_length: int,
    encoder: DocumentEncoder,
) -> None:
    shape = (len(rows), seq_length)
    tokens = np.full(shape, encoder.special_ids[PAD], dtype=token_dtype(encoder.vocab_size))
    answers = np.zeros(shape, dtype=bool)
    ends = np.full((len(rows), max(map(len, rows), default=0)), seq_length, dtype=np.int32)
    for row, members in enumerate(rows):
        at = 0
        for place, sample in enumerate(members):
            ids, is_answer = samples[sample]
            tokens[row, at : at + len(ids)] = ids
            answers[row, at : at + len(ids)] = is_answer
            at += len(ids)
            ends[row, place] = at
    for name, array in (("tokens", tokens), ("answers", answers), ("ends", ends)):
        np.save(folder / f"{split}_{name}.npy", array)


def read_report(folder: Path) -> dict[str, Any]:
    """What `prepare` reported.

    Raises:
        FileNotFoundError: the folder was not prepared, or not to the end.
    """
    return json.loads((folder / REPORT_FILE).read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.sft.prepare", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSONL files of conversations")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder with tokenizer.json and the chat tokens"
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seq-length", type=int, required=True, help="tokens of a row")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="share held out (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the packing (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        conversations = split(read_conversations(args.input), args.valid_fraction)
        report = prepare(conversations, args.tokenizer, args.output_dir, args.seq_length, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
