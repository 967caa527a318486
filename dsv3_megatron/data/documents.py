"""Input files to documents: discovery, what a file holds, cutting into shards, reading, and the split by document.

What a file holds is read from its content (`kind_of`): JSON objects with a document each (JSON Lines, an array, objects
over several lines), or one text.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv3_megatron.data.compressed import is_compressed, opened
from dsv3_megatron.data.errors import InputError
from dsv3_megatron.data.records import (
    JSONL_SUFFIXES,
    Record,
    decoded,
    first_lines,
    json_kind,
    records,
    records_of_lines,
)

__all__ = [
    "FORMATS",
    "InputError",
    "Piece",
    "document_id",
    "find_files",
    "is_validation",
    "kind_of",
    "not_taken",
    "plan_shards",
    "read_piece",
]

FORMATS = ("auto", "json", "text")
JSON_SUFFIXES = (*JSONL_SUFFIXES, ".json")
Kind = Literal["text", "lines", "values"]


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a file: all of it, or the lines of JSON Lines that begin in that range.

    Attributes:
        kind: what the file holds; "" to read it from the file.
    """

    path: str
    start: int
    end: int
    kind: Kind | Literal[""] = ""


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


def not_taken(inputs: Sequence[Path], globs: Sequence[str]) -> dict[str, int]:
    """How many files below the folders match no glob, by suffix."""
    taken = set(find_files(inputs, globs))
    files = {file for path in inputs if path.is_dir() for file in path.rglob("*") if file.is_file()}
    return dict(Counter(file.suffix or file.name for file in sorted(files - taken)).most_common())


def kind_of(path: Path, format: str = "auto", json_key: str = "text") -> Kind:
    """What a file holds: one text, JSON objects line by line, or JSON objects otherwise (an array, over several lines).

    Files whose names say JSON hold objects. Others do where their first two lines that are not blank (or the only one)
    are objects; with one line, or in an array, the first object must have the document's key.

    Raises:
        InputError: the file cannot be read.
    """
    if format == "text":
        return "text"
    name = path.name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
    if format == "json" or name.endswith(JSON_SUFFIXES):
        return json_kind(path)
    return _kind_of_text(first_lines(path, 2), json_key)


def _kind_of_text(lines: list[str], json_key: str) -> Kind:
    """Of a file whose name does not say JSON, from its first two lines that are not blank."""
    if lines and lines[0].startswith("["):
        first = _first_object(" ".join(lines)[1:].lstrip())
        return "values" if first is not None and json_key in first else "text"
    objects = [_first_object(line, whole=True) for line in lines]
    if not objects or any(value is None for value in objects):
        return "text"
    return "lines" if len(objects) > 1 or json_key in (objects[0] or {}) else "text"


def _first_object(text: str, whole: bool = False) -> dict | None:
    """The JSON object that a text begins with (or is); None if there is none."""
    if not text.startswith("{"):
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return None if whole and text[end:].strip() else value


def plan_shards(
    files: Iterable[Path], shard_bytes: int, format: str = "auto", json_key: str = "text"
) -> list[list[Piece]]:
    """Cut the files into shards of about `shard_bytes`: small files together, large JSON Lines by byte range."""
    shards: list[list[Piece]] = []
    room = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        kind = kind_of(path, format, json_key)
        cut = kind == "lines" and not is_compressed(path)
        step = shard_bytes if cut else size
        for start in range(0, size, step):
            piece = Piece(str(path), start, min(start + step, size), kind)
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
    path = Path(piece.path)
    kind = piece.kind or kind_of(path, json_key=json_key)
    if kind == "text":
        with opened(path) as file:
            data = file.read()
        text = decoded(data, lambda offset: f"{path}:{data.count(b'\n', 0, offset) + 1}")
        if text:
            yield text
        return
    found = _lines(piece) if kind == "lines" and not is_compressed(path) else records(path)
    for record in found:
        text = _text(record, json_key)
        if text:
            yield text


def _lines(piece: Piece) -> Iterator[Record]:
    """Records of the lines that begin in a piece; a line that began before it belongs to the piece before."""

    def where(offset: int, _: int) -> str:
        return f"{piece.path}:{_line_number(piece.path, offset)}"

    if piece.start == 0:
        with opened(Path(piece.path)) as file:  # which drops a byte order mark
            start = file.tell()
            yield from records_of_lines(file, where, start, piece.end)
        return
    with open(piece.path, "rb") as file:
        file.seek(piece.start - 1)
        start = piece.start - 1 + len(file.readline())
        yield from records_of_lines(file, where, start, piece.end)


def _text(record: Record, json_key: str) -> str:
    if json_key not in record.value:
        raise InputError(
            f"{record.where}: no key {json_key!r} (see --json-key); the keys are "
            f"{', '.join(map(repr, record.value)) or 'none'}. To take the file as one text: --format text"
        )
    text = record.value[json_key]
    if not isinstance(text, str):
        raise InputError(f"{record.where}: the value of {json_key!r} is {type(text).__name__}, not a string")
    return text


def _line_number(path: str, offset: int) -> int:
    """1-based number of the line that begins at byte `offset`; read only when there is an error to report."""
    lines, left = 1, offset
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines
