"""JSON files of every kind that people have: the records, or an error that names file and line."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.documents import InputError, kind_of, not_taken, plan_shards, read_piece
from dsv3_megatron.data.records import records

THREE = [{"text": "one"}, {"text": "two\nlines"}, {"text": "drei ü 漢字"}]


def values(path: Path) -> list[dict[str, Any]]:
    return [record.value for record in records(path)]


def lines(items: list[Any]) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


FORMS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "lines": ("a.jsonl", lines),
    "lines named json": ("a.json", lines),
    "lines named anything": ("a.data", lines),
    "no last line break": ("a.jsonl", lambda items: lines(items)[:-1]),
    "blank lines": ("a.jsonl", lambda items: b"\n \n" + lines(items).replace(b"\n", b"\n\n\t\n")),
    "Windows": ("a.jsonl", lambda items: lines(items).replace(b"\n", b"\r\n")),
    "byte order mark": ("a.jsonl", lambda items: b"\xef\xbb\xbf" + lines(items)),
    "byte order mark and array": ("a.json", lambda items: b"\xef\xbb\xbf" + json.dumps(items).encode()),
    "array": ("a.json", lambda items: json.dumps(items).encode()),
    "array over lines": ("a.json", lambda items: b"\n" + json.dumps(items, indent=2).encode() + b"\n"),
    "array named jsonl": ("a.jsonl", lambda items: json.dumps(items).encode()),
    "objects over lines": ("a.json", lambda items: b"\n".join(json.dumps(i, indent=1).encode() for i in items)),
    "objects over lines named jsonl": (
        "a.jsonl", lambda items: b"\n".join(json.dumps(i, indent=1).encode() for i in items),
    ),
    "gzip": ("a.jsonl.gz", lambda items: gzip.compress(lines(items))),
    "gzip by another name": ("a.jsonl", lambda items: gzip.compress(lines(items))),
    "gzip of an array": ("a.json.gz", lambda items: gzip.compress(json.dumps(items).encode())),
    "gzip in parts": ("a.jsonl.gz", lambda items: b"".join(gzip.compress(lines([item])) for item in items)),
    "bzip2": ("a.jsonl.bz2", lambda items: bz2.compress(lines(items))),
    "xz": ("a.jsonl.xz", lambda items: lzma.compress(lines(items))),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_records(form: str, tmp_path: Path) -> None:
    name, write = FORMS[form]
    path = tmp_path / name
    path.write_bytes(write(THREE))
    assert values(path) == THREE
    # And as documents of a corpus.
    for shard_bytes in (20, 10_000):
        shards = plan_shards([path], shard_bytes)
        assert [t for shard in shards for piece in shard for t in read_piece(piece)] == [
            i["text"] for i in THREE
        ]


ODD_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"


@given(st.lists(st.text(alphabet=ODD_BREAKS + "a\n", max_size=8), min_size=1, max_size=5))
def test_lines_end_at_line_feeds_only(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    """Whatever `str.splitlines` takes for the end of a line may stand in a JSON string, or between values."""
    path = tmp_path_factory.mktemp("odd") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), newline="")
    assert [value["text"] for value in values(path)] == texts


def test_places_are_where_records_begin(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xe2\x80\xa8"}\n\n{"a": 2}\n')
    assert [r.where for r in records(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 3)]
    (tmp_path / "a.json").write_text('[\n{"a":\n1},\n\n{"a": 2},{"a": 3}]')
    assert [r.where for r in records(tmp_path / "a.json")] == [f"{tmp_path}/a.json:{n}" for n in (2, 5, 5)]
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    assert list(records(tmp_path / "empty.jsonl")) == []


GOOD = b'{"text": "good"}\n\n'
BAD: dict[str, tuple[str, bytes, int, str]] = {
    "null": ("a.jsonl", GOOD + b"null\n", 3, "a JSON object is needed, this is null"),
    "number": ("a.jsonl", GOOD + b"5\n", 3, "a JSON object is needed, this is int"),
    "first line null": ("a.json", b"null\n", 1, "this is null"),
    "array on a line": ("a.jsonl", GOOD + b'["a"]\n', 3, "this is list"),
    "null in an array": ("a.json", b'[{"text": "a"},\nnull]', 2, "this is null"),
    "two on a line": ("a.jsonl", GOOD + b'{"text": "a"} {"text": "b"}\n', 3, "not valid JSON: Extra data"),
    "old Macintosh": ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', 1, "not valid JSON: Extra data"),
    "cut off": ("a.jsonl", GOOD + b'{"text": "go', 3, "not valid JSON"),
    "first line cut off": ("a.jsonl", b'{"text": "go\n' + GOOD, 1, "not valid JSON"),
    "array without end": ("a.json", b'[{"text": "a"},\n{"text": "b"}\n', 3, "the array has no end"),
    "array without comma": ("a.json", b'[{"text": "a"}\n{"text": "b"}]', 2, "a comma is missing"),
    "broken in an array": ("a.json", b'[{"text": "a"},\n{"text": \n"b}]', 3, "not valid JSON: Unterminated string"),
    "half a pair": ("a.jsonl", GOOD + b'{"text": "\\ud83d"}\n', 3, "'text' holds '\\ud83d', half of a surrogate pair"),
    "half a pair deep": ("a.jsonl", GOOD + b'{"a": [{"b": "x\\ude00"}]}\n', 3, "'b' holds '\\ude00', half of"),
    "half a pair as key": ("a.jsonl", GOOD + b'{"\\ud83d": 1}\n', 3, "half of a surrogate pair"),
    "nested": ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", 3, "nested too deeply"),
    "nested a little less": ("a.jsonl", GOOD + b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}\n", 3, "nested too deeply"),
    "nested in json": ("a.json", b'{\n"a": ' + b'{"a":' * 100_000, 1, "nested too deeply"),
    "Latin-1": ("a.jsonl", GOOD + '{"text": "é"}\n'.encode("latin-1"), 3, "not valid UTF-8: byte 0xe9; convert"),
    "Latin-1 in an array": ("a.json", b"[\n\n" + '{"text": "é"}]'.encode("latin-1"), 3, "not valid UTF-8: byte 0xe9"),
    "UTF-16": ("a.jsonl", lines(THREE).decode().encode("utf-16"), 1, "UTF-16: convert it first (iconv -f UTF-16"),
    "UTF-32": ("a.jsonl", lines(THREE).decode().encode("utf-32"), 1, "UTF-32: convert it first"),
    "UTF-16 without mark": ("a.jsonl", lines(THREE[:2]).decode().encode("utf-16-le"), 1, "is it UTF-16?"),
    "NaN": ("a.jsonl", GOOD + b'{"a": NaN}\n', 3, "not valid JSON: NaN is no JSON number"),
    "twice": ("a.jsonl", GOOD + b'{"text": "a", "text": "b"}\n', 3, "the key 'text' is there twice"),
    "long number": ("a.jsonl", GOOD + b'{"a": ' + b"9" * 5000 + b"}\n", 3, "not valid JSON: Exceeds the limit"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(lines(THREE * 500))[:-20], 1, "cut off or damaged"),
    "gzip damaged": ("a.jsonl.gz", gzip.compress(lines(THREE * 500))[:40] + b"xxxxxxxxxxxxxxxx", 1, "damaged"),
    "zstandard": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20), 1, "zstandard: decompress it first"),
    "parquet": ("a.parquet", b"PAR1" + bytes(20), 1, "parquet: write it as JSON Lines first"),
    "zip": ("a.zip", b"PK\x03\x04" + bytes(20), 1, "a zip archive"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    name, content, line, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        values(path)
    text = str(error.value)
    assert text.startswith(f"{path}:{line}: ") and message in text and "\n" not in text
    text.encode()  # it can be printed


@pytest.mark.parametrize(
    "name, content, kind",
    [
        ("a.txt", b"Once upon a time\n", "text"),
        ("a.txt", lines(THREE), "lines"),
        ("a.txt", lines(THREE[:1]), "lines"),
        ("a.txt", json.dumps(THREE).encode(), "values"),
        ("a.md", b"[a link](there)\n", "text"),
        ("a.py", b'{"text": 1}\nx = 1\n', "text"),
        ("a.txt", b'{"other": "key"}\n', "text"),  # one object that is no document: a text
        ("a.txt", b'{"other": 1}\n{"other": 2}\n', "lines"),  # JSON Lines, with an error that names the key
        ("a.json", json.dumps({"text": "x"}, indent=1).encode(), "values"),
        ("a.json", b'{"text": "x"}', "lines"),
        ("a.txt.gz", gzip.compress(b"Once\n", mtime=0), "text"),
        ("a.txt", b"", "text"),
    ],
)
def test_kind_is_read_from_the_content(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name) == kind
    assert kind_of(tmp_path / name, format="text") == "text"


def test_long_first_lines_do_not_hide_what_a_file_is(tmp_path: Path) -> None:
    long = [{"text": "word " * 40_000}, {"text": "second"}]
    for name in ("a.txt", "a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(lines(long))
        assert kind_of(tmp_path / name) == "lines" and values(tmp_path / name) == long


def test_a_missing_key_says_how_to_take_the_file_as_text(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(json.dumps({"name": "x", "version": "1"}, indent=2))
    ((piece,),) = plan_shards([tmp_path / "package.json"], 1000)
    with pytest.raises(
        InputError, match=r"package.json:1: no key 'text' \(see --json-key\).*'name'.*--format text"
    ):
        list(read_piece(piece))
    ((piece,),) = plan_shards([tmp_path / "package.json"], 1000, format="text")
    assert list(read_piece(piece)) == [(tmp_path / "package.json").read_text()]


def test_compressed_text_is_one_document_and_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffÜber\n".encode()))
    ((piece,),) = plan_shards([tmp_path / "a.txt.gz"], 10)
    assert list(read_piece(piece)) == ["Über\n"]


def test_files_that_no_glob_takes_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.json", "c.json", "sub/d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert not_taken([tmp_path], ["*.txt"]) == {".json": 2, ".parquet": 1}
