"""Input files to documents: discovery, cutting into shards, reading, and the split by document.

A `.jsonl` or `.ndjson` file holds one document per line; every other file is one document.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

JSONL_SUFFIXES = (".jsonl", ".ndjson")


class InputError(ValueError):
    """Bad input; the message begins with `file:line`."""


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a file: a whole text file, or the lines of a JSONL file that begin in that
    range."""

    path: str
    start: int
    end: int


def find_files(inputs: Sequence[Path], globs: Sequence[str]) -> list[Path]:
    """Files named by `inputs`, and those below its directories that match one of `globs`; sorted, each
    once."""
    files: set[Path] = set()
    for path in inputs:
        if path.is_dir():
            found = {file for glob in globs for file in path.rglob(glob) if file.is_file()}
            if not found:
                raise InputError(f"--input {path}: no file below it matches --glob {' '.join(globs)}")
            files |= found
        elif path.is_file():
            files.add(path)
        else:
            raise InputError(f"--input {path}: no such file or directory")
    return sorted(files)


def plan_shards(files: Iterable[Path], shard_bytes: int) -> list[list[Piece]]:
    """Cut the files into shards of about `shard_bytes`: small files together, large JSONL files by byte
    range."""
    shards: list[list[Piece]] = []
    room = 0
    for path in files:
        size = path.stat().st_size
        step = shard_bytes if path.suffix in JSONL_SUFFIXES else max(size, 1)
        for start in range(0, size, step):
            piece = Piece(str(path), start, min(start + step, size))
            if room <= 0:
                shards.append([])
                room = shard_bytes
            shards[-1].append(piece)
            room -= piece.end - piece.start
    return shards


def document_id(text: str) -> bytes:
    """16-byte digest of the text. Being of the text and not of the path, it puts exact duplicates in the same
    split."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_validation(doc_id: bytes, valid_fraction: float) -> bool:
    """Whether a document is held out: its id, read as a number in [0, 1), lies below `valid_fraction`."""
    return int.from_bytes(doc_id[:8], "big") < valid_fraction * 2**64


def read_piece(piece: Piece, json_key: str = "text") -> Iterator[str]:
    """Yield the documents of a piece, without empty ones. Raises InputError naming file and line."""
    if Path(piece.path).suffix in JSONL_SUFFIXES:
        yield from _read_jsonl(piece, json_key)
    else:
        data = Path(piece.path).read_bytes()
        text = _decode(data, lambda offset: f"{piece.path}:{data.count(b'\n', 0, offset) + 1}")
        if text:
            yield text


def _read_jsonl(piece: Piece, json_key: str) -> Iterator[str]:
    with open(piece.path, "rb") as file:
        position = piece.start
        if position:  # a line that began before `start` belongs to the piece before
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < piece.end:
            line, line_start = file.readline(), position
            position += len(line)

            def where(_: int, start: int = line_start) -> str:
                return f"{piece.path}:{_line_number(piece.path, start)}"

            if line.strip():
                text = _json_text(_decode(line, where), json_key, where)
                if text:
                    yield text


def _json_text(line: str, json_key: str, where: Callable[[int], str]) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where(0)}: not valid JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where(0)}: a JSON object is needed, this is {type(record).__name__}")
    if json_key not in record:
        raise InputError(
            f"{where(0)}: no key {json_key!r} (see --json-key); the keys are "
            f"{', '.join(map(repr, record)) or 'none'}"
        )
    text = record[json_key]
    if not isinstance(text, str):
        raise InputError(f"{where(0)}: the value of {json_key!r} is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where(0)}: {json_key!r} holds {text[error.start]!r}, half of a surrogate pair"
        ) from None
    return text


def _decode(data: bytes, where: Callable[[int], str]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where(error.start)}: not valid UTF-8: byte 0x{data[error.start]:02x}") from None


def _line_number(path: str, offset: int) -> int:
    """1-based number of the line that begins at byte `offset`; read only when there is an error to report."""
    lines, left = 1, offset
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines
