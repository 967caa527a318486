"""Conversations in the forms that people have: understood, or refused with file, line and key."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.data.records import Record
from dsv3_megatron.sft.conversation import BadConversation, Conversation
from dsv3_megatron.sft.formats import conversation
from dsv3_megatron.sft.prepare import main, read_conversations, split
from dsv3_megatron.sft.rendering import Rendering

USER, ANSWER = {"role": "user", "content": "Name it"}, {"role": "assistant", "content": "add"}
CHAT = [USER, ANSWER]
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}


def read(path: Path, *given: Any, **options: Any) -> list[Conversation]:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in given))
    return read_conversations([path], **options)


def called(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


UNDERSTOOD: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "nulls of a table": (
        {
            "messages": [USER | {"name": None, "tool_calls": None}, ANSWER | {"tool_call_id": None}],
            "tools": None,
        },
        CHAT,
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Na"}, "me", {"text": " it"}]},
                ANSWER,
            ]
        },
        CHAT,
    ),
    "JSON in text": ({"messages": json.dumps(CHAT)}, CHAT),
    "weights": (
        {"messages": [USER | {"weight": 0}, ANSWER | {"weight": 0.0}, USER, ANSWER | {"weight": True}]},
        [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}],
    ),
    "weights by other names": (
        {"messages": [USER, ANSWER | {"loss": False}]},
        [USER, ANSWER | {"weight": 0}],
    ),
    "calls without type": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
                ANSWER,
            ]
        },
        [USER, {"role": "assistant", "tool_calls": [called({"a": 1})]}, ANSWER],
    ),
    "calls in text": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": json.dumps([called("{}")])}]},
        [USER, {"role": "assistant", "content": "", "tool_calls": [called("{}")]}],
    ),
    "calls of earlier years": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "add", "arguments": '{"a": 1}'},
                },
                {"role": "function", "name": "add", "content": "2"},
                ANSWER,
            ]
        },
        [
            USER,
            {"role": "assistant", "tool_calls": [called('{"a": 1}')]},
            {"role": "tool", "name": "add", "content": "2"},
            ANSWER,
        ],
    ),
    "where it is from": ({"messages": CHAT, "id": 7, "source": "web", "parallel_tool_calls": False}, CHAT),
    "no reasoning": ({"messages": [USER, ANSWER | {"reasoning_content": ""}]}, CHAT),
    "line separators": (
        {"messages": [{"role": "user", "content": "a\u2028b\x85c\x0b"}, ANSWER]},
        [{"role": "user", "content": "a\u2028b\x85c\x0b"}, ANSWER],
    ),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_messages(case: str, tmp_path: Path) -> None:
    given, expected = UNDERSTOOD[case]
    (found,) = read(tmp_path / "a.jsonl", given)
    assert list(found.messages) == expected and found.where == f"{tmp_path}/a.jsonl:1"


@pytest.mark.parametrize("given", [[SCHEMA], json.dumps([SCHEMA]), SCHEMA])
def test_tools(given: Any, tmp_path: Path) -> None:
    (found,) = read(tmp_path / "a.jsonl", {"messages": CHAT, "tools": given})
    assert found.tools == [SCHEMA]
    (found,) = read(tmp_path / "a.jsonl", {"messages": CHAT, "functions": [SCHEMA["function"]]})
    assert found.tools == [SCHEMA]
    nothing: Any
    for nothing in ([], "", None):
        (found,) = read(tmp_path / "a.jsonl", {"messages": CHAT, "tools": nothing})
        assert found.tools is None


def test_sharegpt(tmp_path: Path) -> None:
    record = {
        "id": "x",
        "system": "You add.",
        "tools": json.dumps([SCHEMA]),
        "conversations": [
            {"from": "human", "value": "Name it"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "add", "weight": 0},
            {"role": "user", "content": "Name it"},
            {"from": "chatgpt", "value": "add"},
        ],
    }
    (found,) = read(tmp_path / "a.jsonl", record, format="sharegpt")
    assert list(found.messages) == [
        {"role": "system", "content": "You add."},
        USER,
        {"role": "assistant", "tool_calls": [called({"a": 1})]},
        {"role": "tool", "content": "2"},
        ANSWER | {"weight": 0},
        USER,
        ANSWER,
    ]
    assert found.tools == [SCHEMA]


def test_alpaca(tmp_path: Path) -> None:
    records = [
        {"instruction": "Name", "input": "it", "output": "add"},
        {
            "instruction": "Name it",
            "input": "",
            "output": "add",
            "history": [["Hello", "Hi"]],
            "system": "You add.",
        },
    ]
    first, second = read(tmp_path / "a.jsonl", *records, format="alpaca")
    assert list(first.messages) == [{"role": "user", "content": "Name\nit"}, ANSWER]
    assert [item["content"] for item in second.messages] == ["You add.", "Hello", "Hi", "Name it", "add"]
    assert [item["role"] for item in second.messages] == ["system", "user", "assistant", "user", "assistant"]


REFUSED: dict[str, tuple[Any, str, str]] = {
    "sharegpt by default": (
        {"conversations": []},
        "messages",
        "no key 'messages'; it looks like ShareGPT: --format sharegpt",
    ),
    "alpaca by default": (
        {"instruction": "a", "output": "b"},
        "messages",
        "looks like Alpaca: --format alpaca",
    ),
    "messages as sharegpt": (
        {"messages": CHAT},
        "sharegpt",
        "no key 'conversations'; it has messages: --format messages",
    ),
    "messages as alpaca": ({"messages": CHAT}, "alpaca", "no text under 'instruction'; it has messages"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "messages", "looks like preferences"),
    "prompts": ({"prompt": "a", "completion": "b"}, "messages", "no key 'messages'; write it as"),
    "a key that may be text": (
        {"messages": CHAT, "context": "read me"},
        "messages",
        "key 'context': not known.*--ignore-key context",
    ),
    "text beside alpaca": (
        {"instruction": "a", "output": "b", "text": "c"},
        "alpaca",
        "key 'text': not known",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        "messages",
        "content has a part of type 'image_url'; only text",
    ),
    "a part with more": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "note": "b"}]}, ANSWER]},
        "messages",
        r"a part with \['note'\]",
    ),
    "content of numbers": (
        {"messages": [{"role": "user", "content": 5}, ANSWER]},
        "messages",
        "content is int, not text",
    ),
    "content of an object": (
        {"messages": [{"role": "user", "content": {"a": 1}}, ANSWER]},
        "messages",
        "content is dict",
    ),
    "half a weight": (
        {"messages": [USER, ANSWER | {"weight": 0.5}]},
        "messages",
        r"weight=0\.5 of the assistant: 0 \(not",
    ),
    "weight of a user": (
        {"messages": [USER | {"weight": 1}, ANSWER]},
        "messages",
        "weight=1 of the user: only",
    ),
    "two weights": (
        {"messages": [USER, ANSWER | {"weight": 0, "train": True}]},
        "messages",
        "weight and train .* disagree",
    ),
    "a call without name": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "messages",
        "has no name of a",
    ),
    "a call of another type": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"type": "code"}]}]},
        "messages",
        "type 'code'",
    ),
    "a call with more": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [called({}) | {"note": 1}]}]},
        "messages",
        r"\['note'\] of 'add' are not known",
    ),
    "arguments of numbers": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [called(5)]}]},
        "messages",
        "are int",
    ),
    "tools of text": (
        {"messages": CHAT, "tools": "add(a, b)"},
        "messages",
        "tools: not valid JSON: .*the text of tools must be JSON",
    ),
    "tools of names": ({"messages": CHAT, "tools": ["add"]}, "messages", "tools must be a list of objects"),
    "reasoning of a list": (
        {"messages": [USER, ANSWER | {"reasoning_content": ["a"]}]},
        "messages",
        "reasoning_content of the assistant is list",
    ),
    "no role": ({"messages": [{"content": "x"}]}, "messages", "a message needs a role"),
    "messages of text": (
        {"messages": "hello"},
        "messages",
        "messages: not valid JSON: .*the text of messages must be JSON",
    ),
    "messages of an object": ({"messages": {"role": "user"}}, "messages", "messages is dict, not a list"),
    "a string for a message": ({"messages": ["hello"]}, "messages", "'hello': a message is an object"),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "sharegpt",
        "from='narrator': not one of 'human'",
    ),
    "a speaker with more": (
        {"conversations": [{"from": "human", "value": "x", "note": "y"}]},
        "sharegpt",
        "'note' of a message from 'human'",
    ),
    "history of three": (
        {"instruction": "a", "output": "b", "history": [["a", "b", "c"]]},
        "alpaca",
        "no pair of question",
    ),
    "half a pair in text in text": (
        {"messages": CHAT, "tools": '[{"name": "\\ud800"}]'},
        "messages",
        "tools: 'name' holds .* half of a surrogate pair",
    ),
    "calls twice": (
        {"messages": [USER, ANSWER | {"tool_calls": [called({})], "function_call": called({})["function"]}]},
        "messages",
        "function_call and tool_calls of the assistant",
    ),
    "nothing": ({"messages": []}, "messages", "no messages"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_names_file_line_and_key(case: str, tmp_path: Path) -> None:
    record, format, message = REFUSED[case]
    good = {
        "messages": {"messages": CHAT},
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "alpaca": {"instruction": "a", "output": "b"},
    }[format]
    with pytest.raises(BadConversation, match=rf"^{tmp_path}/a\.jsonl:2: .*{message}") as error:
        read(tmp_path / "a.jsonl", good, record, format=format)
    assert "\n" not in str(error.value)


ANYTHING: list[Any] = [
    None, 5, 0, -1, 0.5, True, "", "x", [], {}, [[]], [None], [5], ["a"], {"a": 1}, [["a", "b"]], [{"from": [1]}],
    '[{"a": 1}]', "null", "5", "{", "[" * 5000, '[{"role": "user", "content": "\\ud800"}]', {"name": 5},
    [{"function": 5}], [{"type": []}], [{"name": "f", "arguments": 5}], [{"type": "text", "text": 5}],
]  # fmt: skip
WHOLE: dict[str, Any] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "Ann"},
            {"role": "assistant", "reasoning": "r", "tool_calls": [called({"a": 1}) | {"id": "1"}], "weight": 1},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
            {"role": "assistant", "content": "b", "function_call": {"name": "f", "arguments": "{}"}},
        ],
        "tools": [SCHEMA],
        "functions": [SCHEMA["function"]],
        "chat_template_kwargs": {"thinking": True},
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b", "weight": 0},
        ],
        "system": "s",
        "tools": "[]",
    },
    "alpaca": {"instruction": "i", "input": "j", "output": "o", "system": "s", "history": [["a", "b"]]},
}  # fmt: skip


def with_each_part_replaced(value: Any) -> Iterator[Any]:
    """The value with anything else in the place of each of its parts, one at a time."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for new in (*ANYTHING, *with_each_part_replaced(value[key])):
            changed = copy(value)
            changed[key] = new
            yield changed


@pytest.mark.parametrize("format", WHOLE)
def test_anything_in_any_place_is_understood_or_named(format: str, tokenizer_dir: Path) -> None:
    """No other exception anywhere between a record and its tokens."""
    template, counts = Rendering(tokenizer_dir).build(), Counter[str]()
    for record in with_each_part_replaced(WHOLE[format]):
        try:
            found = conversation(Record(record, "a.jsonl:1"), format)
            counts["read"] += 1
            split([found], 0.5)
            template.samples(found)
            counts["tokens"] += 1
        except BadConversation as error:
            counts["refused"] += 1
            assert "\n" not in str(error)
    assert counts["refused"] > 100 and counts["read"] > 20, counts


@pytest.mark.parametrize(
    "content, line, message",
    [
        (b"", 1, "the file is empty"),
        (b"\n\n", 1, "the file is empty"),
        (b"[]", 1, "the file is empty"),
        (b"null\n", 1, "a JSON object is needed, this is null"),
        (b"5\n", 1, "this is int"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n', 1, "half of a surrogate pair"),
        (b"\n" + b"[" * 50_000 + b"\n", 2, "nested too deeply"),
        ('{"messages": [{"role": "user", "content": "é"}]}\n'.encode("latin-1"), 1, "not valid UTF-8"),
        ('{"messages": []}\n'.encode("utf-16"), 1, "UTF-16"),
    ],
)
def test_files_that_cannot_be_read(
    content: bytes, line: int, message: str, tokenizer_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    """Through the command: one line, no traceback, exit status 1, nothing written."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    words = ["--input", str(path), "--tokenizer", str(tokenizer_dir), "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--seq-length", "64"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {path}:{line}: ") and message in said.err
    assert said.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_keys_can_be_left_out_on_demand(tmp_path: Path) -> None:
    record = {"messages": [USER | {"note": "x"}, ANSWER], "context": "y"}
    (found,) = read(tmp_path / "a.jsonl", record, ignored={"context", "note"})
    assert list(found.messages) == CHAT


def test_forms_of_files_through_the_command(tokenizer_dir: Path, tmp_path: Path) -> None:
    """JSON, an array, gz, a folder: the same rows as JSON Lines."""
    records = [{"messages": [USER, ANSWER | {"content": f"add {i}"}]} for i in range(5)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    forms = {
        "a.jsonl": lines.encode(),
        "b.json": lines.encode(),
        "c.json": b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode(),
        "d.jsonl.gz": gzip.compress(lines.replace("\n", "\r\n").encode()),
        "folder/e.jsonl": lines.encode(),
    }
    rows = set()
    for name, content in forms.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        given = path.parent if "/" in name else path
        output = tmp_path / f"out-{path.name}"
        words = ["--input", str(given), "--tokenizer", str(tokenizer_dir), "--output-dir", str(output)]
        assert main([*words, "--seq-length", "64", "--valid-fraction", "0"]) == 0
        rows.add((output / "train_tokens.npy").read_bytes() + (output / "train_answers.npy").read_bytes())
    assert len(rows) == 1


@pytest.mark.parametrize(
    "more, message",
    [
        (("--format", "sharegpt"), "no key 'conversations'; it has messages"),
        (("--chat-template", "nowhere.jinja"), "--chat-template nowhere.jinja: no such file"),
        (("--template-arguments", '{"thinking": true}'), "--template-arguments .* this is ours"),
        (("--allow-special-tokens",), "are for a jinja template"),
        (("--valid-fraction", "1"), "--valid-fraction 1.0: must be"),
        (("--seq-length", "1"), "--seq-length 1: must be at least 2"),
        (("--tokenizer", "nowhere"), "nowhere/tokenizer.json is not there"),
        (("--input", "nowhere.jsonl"), "--input nowhere.jsonl: no such file"),
    ],
)
def test_options_that_do_not_fit(
    more: tuple[str, ...], message: str, tokenizer_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    import re

    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    words = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer_dir), "--seq-length", "64"]
    assert main([*words, "--output-dir", str(tmp_path / "out"), *more]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and said.startswith("error: ") and said.count("\n") == 1
