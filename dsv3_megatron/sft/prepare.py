"""Conversations to packed rows that `--sft-data` reads.

    python -m dsv3_megatron.sft.prepare --input chats.jsonl --tokenizer DIR --output-dir DIR --seq-length 4096

Each record is `{"messages": [{"role": "system"|"user"|"assistant"|"tool", "content": text}, …], "tools": […]}`, or
ShareGPT's or Alpaca's with `--format`. The chat template is the tokenizer's own where it has one. The last line on
stdout is one JSON object, the report.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.documents import InputError, find_files, is_validation
from dsv3_megatron.data.encode import token_dtype
from dsv3_megatron.data.records import records
from dsv3_megatron.data.tokenizer_files import copy_files, tokenizer_files
from dsv3_megatron.data.vocabulary import DocumentEncoder
from dsv3_megatron.files import write_whole
from dsv3_megatron.sft.conversation import BadConversation, Conversation
from dsv3_megatron.sft.formats import FORMATS, conversation
from dsv3_megatron.sft.pack import pack
from dsv3_megatron.sft.rendering import OURS, Rendering, Rows, rendered

REPORT_FILE = "sft.json"
SPLITS = ("train", "valid")
GLOBS = ("*.jsonl", "*.ndjson", "*.json", "*.jsonl.gz", "*.json.gz")  # taken from folders
LONGEST = 2**24  # tokens of a row; one is allocated whole, however little is in it

__all__ = [
    "REPORT_FILE",
    "SPLITS",
    "Conversation",
    "check_options",
    "main",
    "prepare",
    "read_conversations",
    "read_report",
    "split",
]


def read_conversations(
    files: Sequence[Path], format: str = "messages", ignored: Collection[str] = ()
) -> list[Conversation]:
    """All conversations of files of JSON Lines or JSON, compressed or not.

    Args:
        format: see `formats`.
        ignored: keys that are left out of records and messages.

    Raises:
        BadConversation: names file, line and key.
    """
    found: list[Conversation] = []
    try:
        for file in files:
            before = len(found)
            for record in records(file):
                found.append(conversation(record, format, ignored))
                if not found[-1].messages:
                    raise BadConversation(f"{record.where}: no messages")
            if len(found) == before:
                raise BadConversation(f"{file}:1: no conversations: the file is empty")
    except InputError as error:
        raise BadConversation(str(error)) from None
    if not found:
        raise BadConversation(f"--input {' '.join(map(str, files))}: no conversations")
    return found


def split(
    conversations: Sequence[Conversation | Sequence[Mapping[str, Any]]], valid_fraction: float
) -> dict[str, list[Conversation]]:
    """Train and held-out conversations, by a digest of their text."""
    parts: dict[str, list[Conversation]] = {name: [] for name in SPLITS}
    for given in conversations:
        item = Conversation.of(given)
        text = json.dumps([item.messages, item.tools] if item.tools else item.messages)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        parts["valid" if is_validation(digest, valid_fraction) else "train"].append(item)
    return parts


def prepare(
    conversations: Mapping[str, Sequence[Conversation | Sequence[Mapping[str, Any]]]],
    tokenizer: Path,
    output_dir: Path,
    seq_length: int,
    seed: int = 1234,
    rendering: Rendering | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Write `{train,valid}_{tokens,answers,ends}.npy`, the tokenizer's files and, last, the report `sft.json`.

    `tokens` are ids [rows, seq_length], `answers` bool of that shape, `ends` int32 [rows, most samples in a row]: where
    each sample of a row ends, then seq_length. Samples longer than a row are left out, and counted.

    Args:
        conversations: by "train" and "valid"; valid may be empty.
        rendering: by default with the tokenizer's own chat template, or ours.
        workers: processes that render and tokenise.

    Raises:
        BadConversation: all of a split are too long, or there is none to train on.
    """
    if seq_length < 2:
        raise BadConversation(f"--seq-length {seq_length}: must be at least 2")
    encoder = DocumentEncoder(tokenizer)
    rendering, notes = rendering or Rendering(tokenizer), Counter[str]()
    samples: dict[str, list[Rows]] = {}
    counts: dict[str, int] = {}
    too_long = 0
    for name in SPLITS:
        given = [Conversation.of(item) for item in conversations[name]]
        found = list(rendered(given, rendering, workers, notes, name))
        samples[name] = [sample for sample in found if len(sample[0]) <= seq_length]
        counts[name] = len(given)
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
        "chat_template": rendering.name,
        "notes": dict(notes),
    }
    for name in SPLITS:
        rows = pack([len(ids) for ids, _ in samples[name]], seq_length, seed)
        _write_rows(output_dir, name, samples[name], rows, seq_length, encoder)
        tokens = sum(len(ids) for ids, _ in samples[name])
        report[name] = {
            "conversations": len(samples[name]),
            "given": counts[name],
            "rows": len(rows),
            "tokens": tokens,
            "answer_tokens": sum(int(answer.sum()) for _, answer in samples[name]),
            "filled": round(tokens / max(len(rows) * seq_length, 1), 4),
        }
    if tokenizer.resolve() != output_dir.resolve():
        copy_files(tokenizer, output_dir, tokenizer_files(tokenizer))
    write_whole(output_dir / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    return report


def _write_rows(
    folder: Path,
    split: str,
    samples: Sequence[Rows],
    rows: Sequence[Sequence[int]],
    seq_length: int,
    encoder: DocumentEncoder,
) -> None:
    shape = (len(rows), seq_length)
    tokens = np.full(shape, encoder.pad_id, dtype=token_dtype(encoder.vocab_size))
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


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text}: a JSON object is needed")
    return value


def read_report(folder: Path) -> dict[str, Any]:
    """What `prepare` reported.

    Raises:
        FileNotFoundError: the folder was not prepared, or not to the end.
    """
    return json.loads((folder / REPORT_FILE).read_text())


def check_options(options: argparse.Namespace) -> None:
    """What is asked of conversations and of preferences alike, before the files are read.

    Raises:
        BadConversation: a share or a length that is none, a template that is not there, a file in the folder's place.
    """
    if options.seq_length > LONGEST:
        raise BadConversation(f"--seq-length {options.seq_length}: must be at most {LONGEST}")
    if not 0 <= options.valid_fraction < 1:
        raise BadConversation(
            f"--valid-fraction {options.valid_fraction}: must be at least 0 and less than 1"
        )
    if options.chat_template not in (None, OURS) and not Path(options.chat_template).is_file():
        raise BadConversation(
            f"--chat-template {options.chat_template}: no such file (ours is called {OURS})"
        )
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise BadConversation(f"--output-dir {options.output_dir}: is a file; name a folder")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.sft.prepare", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="files of conversations (JSON Lines, JSON; also .gz), or folders",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder with tokenizer.json: ours, or a released one"
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seq-length", type=int, required=True, help="tokens of a row")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s")
    parser.add_argument(
        "--ignore-key",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="keys of records and messages that are left out (what is not known is an error)",
    )
    parser.add_argument(
        "--chat-template",
        metavar=f"{OURS}|FILE",
        help="ours, or a file of jinja (default: the tokenizer's own, ours where it has none)",
    )
    parser.add_argument(
        "--template-arguments",
        type=_object,
        metavar="JSON",
        help="variables of a jinja template for all conversations, such as '{\"thinking\": true}'",
    )
    parser.add_argument(
        "--allow-special-tokens",
        action="store_true",
        help="special tokens written out in messages are special tokens (with a jinja template; else an error)",
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="share held out (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that render and tokenise (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the packing (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        check_options(args)
        if args.workers < 1:
            raise BadConversation(f"--workers {args.workers}: must be at least 1")
        rendering = Rendering(
            args.tokenizer, args.chat_template, args.template_arguments, args.allow_special_tokens
        )
        rendering.build()  # what does not fit together is said before the files are read
        files = find_files(args.input, GLOBS)
        conversations = split(
            read_conversations(files, args.format, set(args.ignore_key)), args.valid_fraction
        )
        report = prepare(
            conversations,
            args.tokenizer,
            args.output_dir,
            args.seq_length,
            args.seed,
            rendering,
            args.workers,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note, count in report["notes"].items():
        print(f"[sft] {count} {note}", file=sys.stderr)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
