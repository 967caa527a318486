"""Preferences to packed rows that `--preference-data` reads.

    dsv3 preferences --input pairs.jsonl --tokenizer DIR --output-dir DIR --seq-length 4096

Each record is one of Hugging Face's preference forms (`preferences`): texts, or messages, which are rendered with the
tokenizer's own chat template or ours. Both answers of a pair are samples of one row, each with the prompt. The last
line on stdout is one JSON object, the report.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.documents import InputError, find_files
from dsv3_megatron.data.encode import token_dtype
from dsv3_megatron.data.records import records
from dsv3_megatron.data.tokenizer_files import copy_files, tokenizer_files
from dsv3_megatron.data.vocabulary import BOS, EOS, DocumentEncoder
from dsv3_megatron.files import write_whole
from dsv3_megatron.posttrain.preferences import ConversationPair, TextPair, preference
from dsv3_megatron.posttrain.texts import TEXT_BEGINS
from dsv3_megatron.sft.conversation import BadConversation, Conversation
from dsv3_megatron.sft.pack import pack
from dsv3_megatron.sft.prepare import GLOBS, SPLITS, check_options, split
from dsv3_megatron.sft.rendering import OURS, Rendering, Rows

__all__ = ["REPORT_FILE", "main", "prepare", "read_preferences", "read_report"]

REPORT_FILE = "preferences.json"
LEFT_OUT = ("equal", "empty", "too_long")  # pairs that are not trained on, counted in the report

Pair = TextPair | ConversationPair


def read_preferences(files: Sequence[Path], ignored: Collection[str] = ()) -> list[Pair]:
    """All pairs of files of JSON Lines or JSON, compressed or not.

    Raises:
        BadConversation: names file, line and key.
    """
    try:
        found = [preference(record, ignored) for file in files for record in records(file)]
    except InputError as error:
        raise BadConversation(str(error)) from None
    if not found:
        raise BadConversation(f"--input {' '.join(map(str, files))}: no pairs")
    return found


def split_pairs(pairs: Sequence[Pair], valid_fraction: float) -> dict[str, list[Pair]]:
    """Training and held-out pairs, by a digest of the prompt: no prompt is in both."""
    parts: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for pair in pairs:
        conversation = Conversation([{"role": "user", "content": _prompt(pair)}])
        found = split([conversation], valid_fraction)
        parts["valid" if found["valid"] else "train"].append(pair)
    return parts


def _prompt(pair: Pair) -> str:
    if isinstance(pair, TextPair):
        return pair.prompt
    shared = [a for a, b in zip(pair.chosen.messages, pair.rejected.messages, strict=False) if a == b]
    return json.dumps(shared)


def prepare(
    pairs: Mapping[str, Sequence[Pair]],
    tokenizer: Path,
    output_dir: Path,
    seq_length: int,
    seed: int = 1234,
    rendering: Rendering | None = None,
    text_begin: str = TEXT_BEGINS[0],
) -> dict[str, Any]:
    """Write `{train,valid}_{tokens,answers,ends,sequences}.npy`, the tokenizer's files and, last, the report.

    `tokens`, `answers` and `ends` are as fine-tuning's (`sft.prepare`); `sequences` int32 [rows, most samples in a row]
    says which answer a sample is: 2 × pair for the chosen, 2 × pair + 1 for the rejected one, −1 for none. Pairs are
    counted through both splits. Left out, and counted by `LEFT_OUT`: pairs whose answers are the same tokens, pairs
    with an answer without text, pairs longer together than a row.

    Args:
        pairs: by "train" and "valid"; valid may be empty.
        text_begin: of pairs of texts: "begin" or "end", the token before the prompt.

    Raises:
        BadConversation: there is no pair left to train on.
    """
    if seq_length < 4:
        raise BadConversation(f"--seq-length {seq_length}: must be at least 4")
    encoder = DocumentEncoder(tokenizer)
    reader = _Reader(encoder, rendering or Rendering(tokenizer), text_begin)
    kept: dict[str, list[tuple[Rows, Rows]]] = {}
    left_out: Counter[str] = Counter(dict.fromkeys(LEFT_OUT, 0))
    for name in SPLITS:
        kept[name] = []
        for chosen, rejected, empty in reader.samples(pairs[name]):
            reason = _reason_against(chosen, rejected, empty, seq_length)
            if reason is None:
                assert chosen is not None and rejected is not None
                kept[name].append((chosen, rejected))
            else:
                left_out[reason] += 1
    if not kept["train"]:
        counts = ", ".join(f"{left_out[name]} {name.replace('_', ' ')}" for name in LEFT_OUT)
        raise BadConversation(
            f"no pair is left to train on: of {len(pairs['train'])} for training and {len(pairs['valid'])} held out, "
            f"{counts} (a row of --seq-length {seq_length} holds both answers of a pair, each with its prompt)"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / REPORT_FILE).unlink(missing_ok=True)
    report: dict[str, Any] = {
        "seq_length": seq_length,
        "vocab_size": encoder.vocab_size,
        "chat_template": reader.template_name,
        **{name: left_out[name] for name in LEFT_OUT},
    }
    first_pair = 0
    for name in SPLITS:
        report[name] = _write(output_dir, name, kept[name], first_pair, seq_length, seed, encoder)
        report[name]["given"] = len(pairs[name])
        first_pair += len(kept[name])
    if tokenizer.resolve() != output_dir.resolve():
        copy_files(tokenizer, output_dir, tokenizer_files(tokenizer))
    write_whole(output_dir / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    return report


def _reason_against(chosen: Rows | None, rejected: Rows | None, empty: bool, seq_length: int) -> str | None:
    if empty or chosen is None or rejected is None:
        return "empty"
    if np.array_equal(chosen[0], rejected[0]):
        return "equal"
    return "too_long" if len(chosen[0]) + len(rejected[0]) > seq_length else None


class _Reader:
    """Pairs to samples; a template is only built where there are messages."""

    def __init__(self, encoder: DocumentEncoder, rendering: Rendering, text_begin: str) -> None:
        self._encoder, self._rendering = encoder, rendering
        self._begin = BOS if text_begin == "begin" else EOS
        self._template: Any = None
        self.template_name: str | None = None

    def samples(self, pairs: Sequence[Pair]) -> Iterator[tuple[Rows | None, Rows | None, bool]]:
        for pair in pairs:
            if isinstance(pair, TextPair):
                empty = not (pair.chosen.strip() and pair.rejected.strip())
                yield self._text(pair.prompt, pair.chosen), self._text(pair.prompt, pair.rejected), empty
            elif pair.empty:
                yield None, None, True
            else:
                yield self._rendered(pair.chosen), self._rendered(pair.rejected), False

    def _text(self, prompt: str, answer: str) -> Rows:
        """Begin token, prompt, answer, end token; prompt and answer are encoded apart, as they meet at generation."""
        self._encoder.require((BOS, EOS), "pairs of texts")
        special = self._encoder.special_ids
        before = [special[self._begin], *self._encoder.encode(prompt)]
        after = [*self._encoder.encode(answer), special[EOS]]
        learnt = np.repeat([False, True], [len(before), len(after)])
        return np.asarray([*before, *after], np.int32), learnt

    def _rendered(self, conversation: Conversation) -> Rows:
        if self._template is None:
            self._template, self.template_name = self._rendering.build(), self._rendering.name
        try:
            samples = self._template.samples(replace(conversation, where=""))
        except BadConversation as error:
            raise BadConversation(f"{conversation.where}: {error}") from None
        if len(samples) != 1:
            raise BadConversation(
                f"{conversation.where}: the chat template makes {len(samples)} samples of one answer; give the turns "
                "before the answer as the prompt, or use --chat-template dsv3"
            )
        ids, learnt = samples[0]
        return np.asarray(ids, np.int32), np.asarray(learnt, bool)


def _write(
    folder: Path,
    name: str,
    pairs: Sequence[tuple[Rows, Rows]],
    first_pair: int,
    seq_length: int,
    seed: int,
    encoder: DocumentEncoder,
) -> dict[str, Any]:
    rows = pack([len(a[0]) + len(b[0]) for a, b in pairs], seq_length, seed)
    most = 2 * max(map(len, rows), default=0)
    tokens = np.full((len(rows), seq_length), encoder.pad_id, dtype=token_dtype(encoder.vocab_size))
    answers = np.zeros(tokens.shape, dtype=bool)
    ends = np.full((len(rows), most), seq_length, dtype=np.int32)
    sequences = np.full((len(rows), most), -1, dtype=np.int32)
    for row, members in enumerate(rows):
        at = place = 0
        for pair in members:
            for side, (ids, learnt) in enumerate(pairs[pair]):
                span = slice(at, at + len(ids))
                tokens[row, span], answers[row, span] = ids, learnt
                at += len(ids)
                ends[row, place], sequences[row, place] = at, 2 * (first_pair + pair) + side
                place += 1
    for what, array in (("tokens", tokens), ("answers", answers), ("ends", ends), ("sequences", sequences)):
        np.save(folder / f"{name}_{what}.npy", array)
    used = sum(len(a[0]) + len(b[0]) for a, b in pairs)
    return {
        "pairs": len(pairs),
        "rows": len(rows),
        "tokens": used,
        "answer_tokens": sum(int(a[1].sum() + b[1].sum()) for a, b in pairs),
        "filled": round(used / max(len(rows) * seq_length, 1), 4),
    }


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a prepared folder. OSError or ValueError where there is none."""
    report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text())
    if not isinstance(report, dict) or not {"seq_length", *SPLITS} <= report.keys():
        raise ValueError(f"{folder / REPORT_FILE}: not a report of dsv3 preferences")
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv3 preferences", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, help="JSON Lines or JSON, or folders of them"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--seq-length", type=int, required=True, help="tokens of a row: both answers with their prompts"
    )
    parser.add_argument(
        "--text-begin",
        choices=TEXT_BEGINS,
        default=TEXT_BEGINS[0],
        help="the token before a prompt of text: the begin token, or the end token of a document before it "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--ignore-key", nargs="+", default=[], metavar="KEY", help="keys of records to leave out"
    )
    parser.add_argument(
        "--chat-template",
        metavar=f"{OURS}|FILE",
        help="for messages: ours, or a file of jinja (default: the tokenizer's own, ours where it has none)",
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="share of prompts held out (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the packing (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        check_options(args)
        pairs = split_pairs(
            read_preferences(find_files(args.input, GLOBS), set(args.ignore_key)), args.valid_fraction
        )
        rendering = Rendering(args.tokenizer, args.chat_template)
        report = prepare(
            pairs, args.tokenizer, args.output_dir, args.seq_length, args.seed, rendering, args.text_begin
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in LEFT_OUT:
        if report[name]:
            print(f"[preferences] left out: {report[name]} {name.replace('_', ' ')}", file=sys.stderr)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
