"""JSON records of a file, each with its place: JSON Lines, a JSON array, or JSON objects over several lines.

Lines end at \\n and nowhere else (JSON strings may hold U+2028, U+0085 and the like, at which `str.splitlines` cuts).
Nothing is repaired in silence: bad JSON, bad UTF-8, half a surrogate pair, a key that is there twice, NaN, and nesting
too deep to read are errors that name file and line.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsv3_megatron.data.compressed import HEAD, opened
from dsv3_megatron.data.errors import InputError

__all__ = [
    "JSONL_SUFFIXES",
    "Kind",
    "Record",
    "decoded",
    "first_lines",
    "json_kind",
    "parsed",
    "records",
    "records_of_lines",
]

JSONL_SUFFIXES = (".jsonl", ".ndjson")
Kind = Literal["lines", "values"]
_BLANK = " \t\r\n"
_DEEPEST = 200  # levels; what walks through a value later recurses


@dataclass(frozen=True)
class Record:
    """A JSON object and where it begins.

    Attributes:
        where: `file:line`.
    """

    value: dict[str, Any]
    where: str


def records(path: Path) -> Iterator[Record]:
    """The records of a file of either kind, compressed or not. Raises InputError naming file and line."""
    if json_kind(path) == "lines":
        with opened(path) as file:
            yield from records_of_lines(file, lambda offset, number: f"{path}:{number}")
    else:
        yield from _records_of_values(path)


def json_kind(path: Path) -> Kind:
    """Whether a file that holds JSON has an object on each line, or an array or objects over several lines.

    Where the name says JSON Lines, a first line that is no whole object is a mistake in that line.
    """
    first = next(iter(first_lines(path, 1)), "")
    if first.startswith("[") or first == "{":
        return "values"
    if path.name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz").endswith(JSONL_SUFFIXES):
        return "lines"
    try:
        json.loads(first or "null")
        return "lines"
    except (ValueError, RecursionError):
        return "values" if first.startswith("{") else "lines"


def first_lines(path: Path, count: int) -> list[str]:
    """The first lines that are not blank, stripped; an array that begins the file is not read to its line's end."""
    found: list[str] = []
    with opened(path) as file:
        while len(found) < count:
            line = file.readline(HEAD)
            if not line:
                break
            if not line.endswith(b"\n") and not line.lstrip().startswith(b"["):
                line += file.readline()
            if line.strip():
                found.append(line.decode(errors="replace").strip())
    return found


def records_of_lines(
    file: Any, where: Callable[[int, int], str], start: int = 0, end: int | None = None
) -> Iterator[Record]:
    """One record per line that is not blank, of the lines that begin in bytes [start, end) of the text.

    Args:
        file: at byte `start`.
        where: (byte offset of a line, its number counted from `start`) → `file:line`.
    """
    position, number = start, 0
    while end is None or position < end:
        line = file.readline()
        if not line:
            return
        offset, position, number = position, position + len(line), number + 1
        if line.strip():
            yield _record(line, where(offset, number))


def _record(line: bytes, place: str) -> Record:
    return Record(_object(parsed(decoded(line, lambda _: place), place), place), place)


def _records_of_values(path: Path) -> Iterator[Record]:
    """Of an array of objects, or of objects one after the other; the file is held in memory."""
    with opened(path) as file:
        data = file.read()
    text = decoded(data, lambda offset: f"{path}:{data.count(b'\n', 0, offset) + 1}")
    at, line = 0, 1
    in_array = after_value = False

    def place() -> str:
        return f"{path}:{line}"

    while True:
        while at < len(text) and text[at] in _BLANK:
            line += text[at] == "\n"
            at += 1
        if at == len(text):
            if in_array:
                raise InputError(f"{place()}: not valid JSON: the array has no end")
            return
        mark = text[at]
        if mark == "[" and not in_array and not after_value:
            in_array = True
            at += 1
        elif mark == "]" and in_array:
            in_array, after_value = False, True
            at += 1
        elif mark == "," and in_array and after_value:
            after_value = False
            at += 1
        elif in_array and after_value:
            raise InputError(
                f"{place()}: not valid JSON: a comma is missing between two objects of the array"
            )
        else:
            begun = place()
            value, end = _decode(_DECODER.raw_decode, text, at, begun, line)
            yield Record(_object(value, begun), begun)
            line += text.count("\n", at, end)
            at, after_value = end, True


def parsed(text: str, where: str) -> Any:
    """The JSON value of a text. Raises InputError."""
    return _decode(lambda text, at: (_DECODER.decode(text), 0), text, 0, where, None)[0]


def decoded(data: bytes, where: Callable[[int], str]) -> str:
    """UTF-8 to text; `where`: offset of a wrong byte → `file:line`. Raises InputError."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where(error.start)}: not valid UTF-8: byte 0x{data[error.start]:02x}; convert the file first "
            "(iconv -f LATIN1 -t UTF-8, or from what it is)"
        ) from None


def _decode(
    decode: Callable[[str, int], tuple[Any, int]], text: str, at: int, where: str, line: int | None
) -> tuple[Any, int]:
    try:
        value, end = decode(text, at)
        _check_text(value, where)
    except json.JSONDecodeError as error:
        if line is not None:
            where = f"{where.rpartition(':')[0]}:{line + text.count(chr(10), at, error.pos)}"
        hint = " (zero bytes: is it UTF-16?)" if "\0" in text[:100] else ""
        raise InputError(f"{where}: not valid JSON: {error.msg} (column {error.colno}){hint}") from None
    except RecursionError:
        raise InputError(f"{where}: not readable: nested too deeply (more than {_DEEPEST} levels)") from None
    except ValueError as error:  # of _no_constant and _no_twins, and numbers of thousands of digits
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not valid JSON: {error}") from None
    return value, end


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key that is there twice would lose the first value."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twin!r} is there twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_twins)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"{where}: a JSON object is needed, this is {kind}")
    return value


def _check_text(value: Any, where: str) -> None:
    """All strings are text (JSON can write half of a surrogate pair, which is none); nothing is nested too deeply."""
    waiting: list[tuple[str | None, Any, int]] = [(None, value, 0)]
    while waiting:
        key, item, depth = waiting.pop()
        if depth > _DEEPEST:
            raise RecursionError
        if isinstance(item, dict):
            waiting += [(name, element, depth + 1) for name, element in item.items()]
            waiting += [(name, name, depth) for name in item]
        elif isinstance(item, list):
            waiting += [(key, element, depth + 1) for element in item]
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{where}: {key or 'the value'!r} holds {item[error.start]!r}, half of a surrogate pair"
                ) from None
