"""Reading: shards lose and repeat nothing, errors name file and line, the split is by document."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.documents import (
    InputError,
    Piece,
    document_id,
    find_files,
    is_validation,
    plan_shards,
    read_piece,
)


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def read_all(shards):
    return [text for shard in shards for piece in shard for text in read_piece(piece)]


@given(
    st.lists(st.text(alphabet="aé\n \u2028", min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(1, 80),
    st.booleans(),
)
def test_byte_ranges_cut_jsonl_without_loss(tmp_path_factory, texts, shard_bytes, final_newline):
    path = write_jsonl(tmp_path_factory.mktemp("jsonl") / "a.jsonl", texts)
    if not final_newline:
        path.write_bytes(path.read_bytes()[:-1])
    shards = plan_shards([path], shard_bytes)
    assert sum(piece.end - piece.start for shard in shards for piece in shard) == path.stat().st_size
    assert read_all(shards) == texts


def test_text_files_are_whole_documents_and_share_shards(tmp_path):
    texts = {"b.txt": "second\r\nline", "a.txt": "first", "c.txt": "", "sub/d.txt": "ünïcode"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "skipped.bin").write_bytes(b"\xff")
    files = find_files([tmp_path, tmp_path / "a.txt"], ["*.txt"])
    shards = plan_shards(files, shard_bytes=10)
    assert read_all(shards) == ["first", "second\r\nline", "ünïcode"]
    assert [len(shard) for shard in shards] == [2, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'["a"]', "a JSON object is needed, this is list"),
        (b'{"body": "a"}', "no key 'text' (see --json-key); the keys are 'body'"),
        (b'{"text": 3}', "the value of 'text' is int, not a string"),
        (b'{"text": "\xff"}', "not valid UTF-8: byte 0xff"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("shard_bytes", [10_000, 16])
def test_bad_line_is_named(tmp_path, line, message, shard_bytes):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(InputError) as error:
        read_all(plan_shards([path], shard_bytes))
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_bad_utf8_in_text_is_named(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"one\ntwo\nthr\x80ee\n")
    with pytest.raises(InputError, match=r"bad\.txt:3: not valid UTF-8: byte 0x80"):
        list(read_piece(Piece(str(path), 0, path.stat().st_size)))


def test_missing_input_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        find_files([tmp_path / "none"], ["*"])
    with pytest.raises(InputError, match=r"matches --glob \*\.txt"):
        find_files([tmp_path], ["*.txt"])


def test_split_share_and_nesting():
    ids = [document_id(str(i)) for i in range(20_000)]
    held_out = {doc_id for doc_id in ids if is_validation(doc_id, 0.05)}
    assert abs(len(held_out) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    # A larger share holds out more documents, and still those of the smaller one.
    assert held_out < {doc_id for doc_id in ids if is_validation(doc_id, 0.1)}
    assert not any(is_validation(doc_id, 0.0) for doc_id in ids)
    assert all(is_validation(doc_id, 1.0) for doc_id in ids)
