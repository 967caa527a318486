"""Text or JSON to a byte-level BPE tokenizer and Megatron indexed datasets.

    python -m dsv3_megatron.data.prepare --input PATH... --output-dir DIR --vocab-size N
    python -m dsv3_megatron.data.prepare --input PATH... --output-dir DIR --tokenizer RELEASED

The folder then serves a Megatron run as it is: `--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR
--train-data-path DIR/train --valid-data-path DIR/valid`. Steps: find the files, train the tokenizer on
training documents (or take the given one), encode shards of documents in worker processes, merge the shards. Each
step ends with a rename, so the same command goes on where an interrupted one stopped, and the result does not depend on
interruptions or on --workers.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsv3_megatron.data.documents import (
    FORMATS,
    InputError,
    Piece,
    document_id,
    find_files,
    is_validation,
    not_taken,
    plan_shards,
    read_piece,
)
from dsv3_megatron.data.encode import (
    SPLITS,
    Counts,
    EncodeSettings,
    encode_shard,
    shard_counts,
    shard_documents,
    token_dtype,
)
from dsv3_megatron.data.tokenizer_files import TOKENIZER_FILE, copy_files, tokenizer_files
from dsv3_megatron.data.vocabulary import (
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    DocumentEncoder,
    save_tokenizer,
    train_tokenizer,
)
from dsv3_megatron.files import write_whole

REPORT_FILE = "prepared.json"
WORK_DIR = ".prepare"


@dataclass(frozen=True)
class PrepareSettings:
    """Everything that decides the result. Changing one of these in a started folder is an error.

    Attributes:
        vocab_size: of the tokenizer that is trained; None with `tokenizer`.
        tokenizer: folder of an existing one.
        format: what the files hold, see `documents.kind_of`.
    """

    vocab_size: int | None
    encode: EncodeSettings = field(default_factory=EncodeSettings)
    tokenizer_bytes: int = 1 << 30
    shard_bytes: int = 16 << 20
    tokenizer: str | None = None
    format: str = "auto"

    def check(self) -> None:
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise InputError(
                "--vocab-size N trains a tokenizer, --tokenizer DIR takes one that is there: give one of the two"
            )
        for name, value in (
            ("--valid-fraction", self.encode.valid_fraction),
            ("--fim-rate", self.encode.fim_rate),
            ("--split-rate", self.encode.split_rate),
        ):
            if not 0 <= value <= 1:
                raise InputError(f"{name} {value}: must be from 0 to 1")
        for name, number in (
            ("--shard-bytes", self.shard_bytes),
            ("--tokenizer-bytes", self.tokenizer_bytes),
        ):
            if number < 1:
                raise InputError(f"{name} {number}: must be at least 1")
        if self.encode.seed < 0:
            raise InputError(f"--seed {self.encode.seed}: must not be negative")
        if self.tokenizer is not None:
            if not Path(self.tokenizer).is_dir():
                raise InputError(f"--tokenizer {self.tokenizer}: no such folder")
            encoder = DocumentEncoder(Path(self.tokenizer))
            if self.encode.fim_rate:
                encoder.require(
                    (FIM_BEGIN, FIM_HOLE, FIM_END), f"--fim-rate {self.encode.fim_rate} (0: no FIM)"
                )


class Progress:
    """`label: 12.0/40.1 MB, 2.1 MB/s, ETA 13 s` on stderr, at most every `interval` seconds, and at the
    end."""

    def __init__(self, label: str, total_bytes: int, interval: float = 2.0) -> None:
        self.label, self.total, self.interval = label, total_bytes, interval
        self.done = 0
        self.start = self.last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        now = time.monotonic()
        if now - self.last >= self.interval or self.done >= self.total:
            self.last = now
            rate = self.done / max(now - self.start, 1e-9)
            eta = (self.total - self.done) / max(rate, 1e-9)
            _say(
                f"{self.label}: {self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB, "
                f"{rate / 1e6:.1f} MB/s, ETA {eta:.0f} s"
            )


def _say(message: str) -> None:
    print(f"[prepare] {message}", file=sys.stderr, flush=True)


def prepare(files: Sequence[Path], output_dir: Path, settings: PrepareSettings, workers: int = 1) -> dict:
    """Prepare `files` (text, or JSON with a document per object) into `output_dir`; returns the report it writes
    there.

    Writes the tokenizer folder's files, `train.bin/.idx`, `valid.bin/.idx` (none for `valid_fraction` 0) and
    `prepared.json`. A finished folder of the same files and settings is left alone.

    Raises:
        InputError: bad input (the message names file and line), or a folder begun with other files or
        settings.
    """
    settings.check()
    output_dir.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(files, settings)
    report_path = output_dir / REPORT_FILE
    if report_path.exists():
        report = json.loads(report_path.read_text())
        if report["fingerprint"] != fingerprint["digest"]:
            raise _other_preparation(output_dir, report["settings"], fingerprint["settings"])
        _say(f"{output_dir} is up to date")
        return report

    work_dir = output_dir / WORK_DIR
    plan_path = work_dir / "plan.json"
    if plan_path.exists():
        begun = json.loads(plan_path.read_text())
        if begun["digest"] != fingerprint["digest"]:
            raise _other_preparation(output_dir, begun["settings"], fingerprint["settings"])
    else:
        work_dir.mkdir(exist_ok=True)
        write_whole(plan_path, json.dumps(fingerprint, indent=2))

    shards = plan_shards(files, settings.shard_bytes, settings.format, settings.encode.json_key)
    _make_tokenizer(shards, work_dir / "tokenizer", settings)
    counts = _encode(shards, work_dir, settings.encode, workers)
    if settings.encode.valid_fraction > 0 and not counts.valid_documents:
        raise InputError(
            f"none of {counts.train_documents} documents was held out: raise --valid-fraction "
            f"{settings.encode.valid_fraction} and use a new --output-dir"
        )
    if not counts.train_documents:
        raise InputError("no document is left to train on: lower --valid-fraction, or give more --input")
    vocab_size = _merge(len(shards), work_dir, output_dir, counts)
    for file in (work_dir / "tokenizer").iterdir():
        os.replace(file, output_dir / file.name)
    report = {
        "fingerprint": fingerprint["digest"],
        "settings": fingerprint["settings"],
        "vocab_size": vocab_size,
        **asdict(counts),
    }
    write_whole(report_path, json.dumps(report, indent=2) + "\n")
    shutil.rmtree(work_dir)
    return report


def _fingerprint(files: Sequence[Path], settings: PrepareSettings) -> dict:
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    shown = {**asdict(settings), "num_files": len(stats), "num_bytes": sum(size for _, size, _ in stats)}
    for name in ("tokenizer", "format"):  # folders made before there was a choice are still what they were
        if shown[name] == getattr(PrepareSettings, name):
            del shown[name]
    if settings.tokenizer is not None:
        content = (Path(settings.tokenizer) / TOKENIZER_FILE).read_bytes()
        stats.append((hashlib.blake2b(content, digest_size=16).hexdigest(), len(content), 0))
    digest = hashlib.blake2b(json.dumps([stats, shown]).encode(), digest_size=16).hexdigest()
    return {"digest": digest, "settings": shown}


def _other_preparation(output_dir: Path, there: dict, asked: dict) -> InputError:
    changes = [
        f"{key} {there.get(key)} there, {value} asked"
        for key, value in asked.items()
        if there.get(key) != value
    ]
    return InputError(
        f"--output-dir {output_dir} holds another preparation "
        f"({'; '.join(changes) or 'the input files have changed'}): use a new folder, or remove this one"
    )


def _make_tokenizer(shards: Sequence[Sequence[Piece]], folder: Path, settings: PrepareSettings) -> None:
    """Train the tokenizer on training documents, or on a share of them chosen by id if there are too many
    bytes."""
    if (folder / TOKENIZER_FILE).exists():
        _say("the tokenizer is there already")
        return
    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    if settings.tokenizer is not None:
        given = Path(settings.tokenizer)
        copy_files(given, unfinished, tokenizer_files(given))
        os.replace(unfinished, folder)
        return
    assert settings.vocab_size is not None  # of `check`
    pieces = [piece for shard in shards for piece in shard]
    total = sum(piece.end - piece.start for piece in pieces)
    share = min(1.0, settings.tokenizer_bytes / max(total, 1))
    progress = Progress("tokenizer", total)

    def texts() -> Iterator[str]:
        for piece in pieces:
            for text in read_piece(piece, settings.encode.json_key):
                doc_id = document_id(text)
                # The split looks at the first 8 bytes of the id, the share at the others: they are
                # independent.
                if not is_validation(doc_id, settings.encode.valid_fraction) and is_validation(
                    doc_id[8:], share
                ):
                    yield text
            progress.add(piece.end - piece.start)
        _say("tokenizer: computing merges")

    tokenizer = train_tokenizer(texts(), settings.vocab_size)
    save_tokenizer(tokenizer, unfinished)
    os.replace(unfinished, folder)
    if tokenizer.get_vocab_size() < settings.vocab_size:
        _say(
            f"the text gives {tokenizer.get_vocab_size()} tokens only, "
            f"--vocab-size {settings.vocab_size} was asked"
        )


def _shard_path(work_dir: Path, index: int) -> Path:
    return work_dir / f"shard-{index:06d}.npz"


def _encode(
    shards: Sequence[Sequence[Piece]], work_dir: Path, settings: EncodeSettings, workers: int
) -> Counts:
    """Encode the shards that are not there yet; the first error stops the rest."""
    sizes = [sum(piece.end - piece.start for piece in shard) for shard in shards]
    todo = [index for index in range(len(shards)) if not _shard_path(work_dir, index).exists()]
    counts = Counts()
    for index in set(range(len(shards))) - set(todo):
        counts += shard_counts(_shard_path(work_dir, index))
    if len(todo) < len(shards):
        _say(f"going on: {len(shards) - len(todo)} of {len(shards)} shards are there already")
    progress = Progress("encode", sum(sizes[index] for index in todo))

    def job(index: int) -> tuple[Sequence[Piece], Path, Path, EncodeSettings]:
        return shards[index], work_dir / "tokenizer", _shard_path(work_dir, index), settings

    if workers == 1 or len(todo) <= 1:
        for index in todo:
            counts += encode_shard(*job(index))
            progress.add(sizes[index])
        return counts
    # spawn: the tokenizers library has threads here by now, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches the workers too; left to themselves they finish the shards under way, which then count.
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(
        min(workers, len(todo)), context, initializer=signal.signal, initargs=ignore_interrupts
    ) as pool:
        futures = {pool.submit(encode_shard, *job(index)): index for index in todo}
        try:
            for future in as_completed(futures):
                counts += future.result()
                progress.add(sizes[futures[future]])
        except BaseException:
            _say("stopping: shards under way are finished, the others are left for next time")
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return counts


def _merge(num_shards: int, work_dir: Path, output_dir: Path, counts: Counts) -> int:
    """Write the shards' documents, in shard order, as Megatron indexed datasets; returns the vocabulary's
    size."""
    with warnings.catch_warnings(action="ignore"):  # what Megatron warns of (no Apex, …) does not matter here
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # imports torch: seconds

    vocab_size = DocumentEncoder(work_dir / "tokenizer").vocab_size
    dtype = token_dtype(vocab_size)
    for split in SPLITS:
        num_tokens = getattr(counts, f"{split}_tokens")
        if not num_tokens:
            continue
        prefix = work_dir / split
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        progress = Progress(f"merge {split}", num_tokens * dtype().itemsize)
        for index in range(num_shards):
            for tokens in shard_documents(_shard_path(work_dir, index), split):
                builder.add_document(tokens, [tokens.size])
                progress.add(tokens.nbytes)
        builder.finalize(f"{prefix}.idx")
        for suffix in (".bin", ".idx"):
            os.replace(prefix.with_suffix(suffix), output_dir / f"{split}{suffix}")
    return vocab_size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.data.prepare", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help="files (text or JSON, also .gz) and folders")
    add("--output-dir", type=Path, required=True)
    add("--vocab-size", type=int, help="train a tokenizer of this size, special tokens included")
    add(
        "--tokenizer", type=Path, help="take this folder's tokenizer (tokenizer.json) instead of training one"
    )
    add(
        "--format",
        choices=FORMATS,
        default=PrepareSettings.format,
        help="what files hold: json (an object per document), text (a document per file), auto by content (default)",
    )
    add(
        "--glob",
        nargs="+",
        default=["*.txt", "*.jsonl", "*.txt.gz", "*.jsonl.gz"],
        help="files to take from folders (default: %(default)s)",
    )
    add("--json-key", default=EncodeSettings.json_key, help="key of the text in JSON (default: %(default)s)")
    add(
        "--valid-fraction",
        type=float,
        default=EncodeSettings.valid_fraction,
        help="share of held-out documents",
    )
    add(
        "--fim-rate",
        type=float,
        default=EncodeSettings.fim_rate,
        help="share of training documents in FIM form",
    )
    add(
        "--split-rate",
        type=float,
        default=EncodeSettings.split_rate,
        help="share of tokens joining punctuation and line breaks that are split, in training documents",
    )
    add("--seed", type=int, default=EncodeSettings.seed, help="of the FIM choices (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that encode (default: %(default)s)",
    )
    add(
        "--tokenizer-bytes",
        type=int,
        default=PrepareSettings.tokenizer_bytes,
        help="text to train it on, about",
    )
    add("--shard-bytes", type=int, default=PrepareSettings.shard_bytes, help="unit of work and of resuming")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    settings = PrepareSettings(
        vocab_size=args.vocab_size,
        encode=EncodeSettings(args.json_key, args.valid_fraction, args.fim_rate, args.split_rate, args.seed),
        tokenizer_bytes=args.tokenizer_bytes,
        shard_bytes=args.shard_bytes,
        tokenizer=None if args.tokenizer is None else str(args.tokenizer),
        format=args.format,
    )
    try:
        if args.workers < 1:
            raise InputError(f"--workers {args.workers}: must be at least 1")
        files = find_files(args.input, args.glob)
        if left := not_taken(args.input, args.glob):
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in list(left.items())[:5])
            _say(f"{sum(left.values())} files match no --glob and are not taken: {kinds}")
        report = prepare(files, args.output_dir, settings, args.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
