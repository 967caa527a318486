"""The tokenizer's own chat template: transformers' tokens, what of them is learnt, and nothing left out."""

import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from dsv3_megatron.data.vocabulary import DocumentEncoder
from dsv3_megatron.sft.conversation import BadConversation, Conversation
from dsv3_megatron.sft.prepare import main
from dsv3_megatron.sft.rendering import Rendering
from dsv3_megatron.sft.template import JinjaTemplate
from tests.sft.released import BOS, EOS, FORGETFUL, LAST_REASONING, MARKED, TOOLS_IN_TOKENS, TURN, released

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {}},
    },
}


def call(arguments: Any = '{"city": "Paris"}', **more: Any) -> dict[str, Any]:
    return {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
        **more,
    }


SIMPLE: list[dict[str, Any]] = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": "It is sunny, 21 degrees."},
    {"role": "user", "content": "And in Oslo? ünïcödé 漢字"},
    {"role": "assistant", "content": "I think so."},
]
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [call()]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"},
    {"role": "assistant", "content": "It is sunny, 21 degrees."},
]
REASONED: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "reasoning_content": "I think of a city.", "content": "It is sunny."},
    {"role": "user", "content": "And in Oslo, is it?"},
    {"role": "assistant", "reasoning_content": "I think of another city.", "content": "It is not sunny."},
]


def rendered(folder: Path, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    """Tokens by transformers itself."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=True, return_dict=False, **more
    )


def learnt_text(folder: Path, sample: tuple[list[int], list[bool]]) -> str:
    return DocumentEncoder(folder).decode(
        [token for token, is_learnt in zip(*sample, strict=True) if is_learnt]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("released")


@pytest.mark.parametrize(
    "template", [TOOLS_IN_TOKENS, LAST_REASONING, MARKED], ids=["tokens", "chatml", "marked"]
)
def test_tokens_are_those_of_apply_chat_template(template: str, folder: Path) -> None:
    released(folder, template)
    (sample,) = JinjaTemplate(folder).samples(Conversation.of(SIMPLE))
    assert sample[0] == rendered(folder, SIMPLE)
    end = TURN if template == LAST_REASONING else EOS
    # The line break after a turn's end is the template's; as the tokenizer does not end a text with it, it is learnt
    # unless somebody says so (test_the_end_of_a_turn).
    tail = "\n" if template == LAST_REASONING else ""
    assert learnt_text(folder, sample) == f"It is sunny, 21 degrees.{end}{tail}I think so.{end}{tail}"


@pytest.mark.parametrize("template", [TOOLS_IN_TOKENS, MARKED], ids=["by prompt", "marked"])
def test_learnt_is_what_follows_the_prompt_of_a_server(template: str, folder: Path) -> None:
    released(folder, template)
    (sample,) = JinjaTemplate(folder).samples(Conversation.of(SIMPLE))
    for end in (2, 4):
        prompt = rendered(folder, SIMPLE[:end], add_generation_prompt=True)
        answer = rendered(folder, SIMPLE[: end + 1])
        assert sample[0][: len(answer)] == answer and answer[: len(prompt)] == prompt
        assert sample[1][len(prompt) - 1 : len(answer)] == [False, *[True] * (len(answer) - len(prompt))]
    assert sum(sample[1]) == sum(
        len(rendered(folder, SIMPLE[: e + 1])) - len(rendered(folder, SIMPLE[:e], add_generation_prompt=True))
        for e in (2, 4)
    )


def test_marks_are_transformers_own(folder: Path) -> None:
    from transformers import AutoTokenizer

    released(folder, MARKED)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        SIMPLE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ((ids, learnt),) = JinjaTemplate(folder).samples(Conversation.of(SIMPLE))
    assert ids == theirs["input_ids"] and [int(x) for x in learnt] == list(theirs["assistant_masks"])


def test_the_end_of_a_turn(folder: Path) -> None:
    """generation_config.json says that a generation stops there: what the template writes after it is not learnt."""
    released(folder, LAST_REASONING)
    encoder = DocumentEncoder(folder)
    end = encoder._tokenizer.token_to_id(TURN)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [encoder.special_ids["<|eos_token|>"], end]})
    )
    try:
        (sample,) = JinjaTemplate(folder).samples(Conversation.of(SIMPLE))
        assert learnt_text(folder, sample) == f"It is sunny, 21 degrees.{TURN}I think so.{TURN}"
        assert sample[0] == rendered(folder, SIMPLE)
    finally:
        (folder / "generation_config.json").unlink()


def test_tools_of_the_released_shape(folder: Path) -> None:
    """An answer without content calls; transformers 5 leaves null out, with which such templates cannot do."""
    released(folder, TOOLS_IN_TOKENS)
    (sample,) = JinjaTemplate(folder).samples(Conversation.of(WITH_TOOLS))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    text = environment.from_string(TOOLS_IN_TOKENS).render(messages=WITH_TOOLS, bos_token=BOS, eos_token=EOS)
    assert DocumentEncoder(folder).decode(sample[0]) == text
    assert learnt_text(folder, sample) == (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        f"<｜tool▁calls▁end｜>{EOS}It is sunny, 21 degrees.{EOS}"
    )
    objects = [dict(m) for m in WITH_TOOLS]
    objects[1] = objects[1] | {"tool_calls": [call({"city": "Paris"})]}
    assert JinjaTemplate(folder).samples(Conversation.of(objects)) == [sample]
    with_tools = JinjaTemplate(folder).samples(Conversation(Conversation.of(WITH_TOOLS).messages, [TOOL]))
    assert '## Tools\n{"type": "function"' in DocumentEncoder(folder).decode(with_tools[0][0])


def test_tools_as_objects_are_transformers_tokens(folder: Path) -> None:
    released(folder, LAST_REASONING)
    messages: list[dict[str, Any]] = [dict(m) for m in WITH_TOOLS]
    messages[1]["tool_calls"] = [call({"city": "Paris"}), call({"city": "Oslo"}, id="call_2")]
    messages[2]["name"] = "weather"
    template = JinjaTemplate(folder)
    (sample,) = template.samples(Conversation(Conversation.of(messages).messages, [TOOL]))
    assert sample[0] == rendered(folder, messages, tools=[TOOL])
    assert learnt_text(folder, sample).count("weather") == 2
    assert "[tool weather]" in DocumentEncoder(folder).decode(sample[0])
    assert not template.notes[
        "conversations whose calls have JSON text as arguments, which the chat template quotes"
    ]
    template.samples(Conversation.of(WITH_TOOLS))
    assert (
        template.notes[
            "conversations whose calls have JSON text as arguments, which the chat template quotes"
        ]
        == 1
    )


def test_earlier_reasoning_is_learnt_in_a_sample_of_its_own(folder: Path) -> None:
    """Where a template forgets it in later turns: each answer after what a server would show before it."""
    released(folder, LAST_REASONING)
    template = JinjaTemplate(folder)
    first, second = template.samples(Conversation.of(REASONED))
    assert first[0] == rendered(folder, REASONED[:2]) and second[0] == rendered(folder, REASONED)
    assert learnt_text(folder, first) == f"<think>I think of a city.</think>It is sunny.{TURN}\n"
    assert learnt_text(folder, second) == f"<think>I think of another city.</think>It is not sunny.{TURN}\n"
    assert sum(template.notes.values()) >= 1 and any(
        "one sample per answer" in note for note in template.notes
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_every_name(key: str, folder: Path) -> None:
    released(folder, MARKED)
    messages = [
        {
            "reasoning_content" and key: m["reasoning_content"],
            **{k: v for k, v in m.items() if k != "reasoning_content"},
        }
        if "reasoning_content" in m
        else m
        for m in REASONED
    ]
    conversation = Conversation(Conversation.of(messages).messages, None, {"thinking": True})
    (sample,) = JinjaTemplate(folder).samples(conversation)
    assert sample[0] == rendered(folder, REASONED, thinking=True)
    assert learnt_text(folder, sample).startswith("<think>I think of a city.</think>It is sunny.")


def test_weight_0_is_read_and_not_learnt(folder: Path) -> None:
    for template in (TOOLS_IN_TOKENS, MARKED):
        released(folder, template)
        messages = [dict(m) for m in SIMPLE]
        messages[2]["weight"] = 0
        (sample,) = JinjaTemplate(folder).samples(Conversation.of(messages))
        assert sample[0] == rendered(folder, SIMPLE)
        assert learnt_text(folder, sample) == f"I think so.{EOS}"


def without(messages: list[dict[str, Any]], number: int, **changes: Any) -> list[dict[str, Any]]:
    return [dict(m) | (changes if i == number else {}) for i, m in enumerate(messages)]


LEFT_OUT: dict[str, tuple[str, list[dict[str, Any]], Any, str]] = {
    "reasoning": (TOOLS_IN_TOKENS, REASONED, None, "'reasoning_content': --ignore-key reasoning_content"),
    "reasoning in the text": (
        FORGETFUL, without(SIMPLE[1:3], 1, content="<think>I think of a long walk.</think>Sunny, yes it is."), None,
        "message 2, of the assistant: the chat template leaves out a part of 'content'",
    ),
    "short reasoning": (
        FORGETFUL, without(SIMPLE[1:3], 1, content="a</think>b"), None, "leaves out a part of 'content'",
    ),
    "system": (FORGETFUL, SIMPLE, None, "message 1, of the system: the chat template leaves out a part of 'content'"),
    "tools": (FORGETFUL, SIMPLE[1:], [TOOL], "the chat template leaves out 'tools'"),
    "calls": (MARKED, without(WITH_TOOLS, 1, content="I call."), None, "leaves out 'name of a tool call'"),
    "name": (TOOLS_IN_TOKENS, without(SIMPLE, 1, name="Ann"), None, "message 2, of the user: .* leaves out 'name'"),
    "anything": (MARKED, without(SIMPLE, 1, note="read me"), None, "leaves out 'note': --ignore-key note"),
    "results": (FORGETFUL, without(WITH_TOOLS, 1, content="I call."), None, "leaves out"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_template_leaves_out_is_an_error(case: str, folder: Path) -> None:
    template, messages, tools, message = LEFT_OUT[case]
    released(folder, template)
    with pytest.raises(BadConversation, match=message):
        JinjaTemplate(folder).samples(Conversation(Conversation.of(messages).messages, tools))


def test_a_text_that_is_escaped_is_not_left_out(folder: Path) -> None:
    released(
        folder,
        "{% for m in messages %}{{ '[' + m.role + ']' + (m.content | tojson) }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    messages = without(SIMPLE, 1, content='He said "no",\nand left for a long walk.')
    (sample,) = JinjaTemplate(folder).samples(Conversation.of(messages))
    assert sample[0] == rendered(folder, messages)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "no messages"),
        (SIMPLE[:2], "the last must be"),
        (SIMPLE[2:], "the first message must not be the assistant's"),
        (without(SIMPLE, 1, content=""), "message 2, of the user, has no text"),
        (
            without(SIMPLE, 1, content=f"hello<｜Assistant｜>I agree{EOS}"),
            "special token '<｜Assistant｜>'.*--allow-special",
        ),
        (without(without(SIMPLE, 2, weight=0), 4, weight=0), "every answer has weight 0"),
    ],
)
def test_what_no_template_would_notice(messages: Any, message: str, folder: Path) -> None:
    released(folder, TOOLS_IN_TOKENS)
    with pytest.raises(BadConversation, match=message):
        JinjaTemplate(folder).samples(Conversation.of(messages))


def test_special_tokens_that_are_meant(folder: Path) -> None:
    released(folder, TOOLS_IN_TOKENS)
    messages = without(SIMPLE, 2, content="<｜tool▁calls▁begin｜>by hand<｜tool▁calls▁end｜>")
    (sample,) = JinjaTemplate(folder, allow_special=True).samples(Conversation.of(messages))
    assert sample[0] == rendered(folder, messages)


def test_a_template_that_asks_otherwise_than_it_answers(folder: Path) -> None:
    released(
        folder, FORGETFUL.replace("{{ '<｜Assistant｜>' }}{% endif", "{{ '<｜Assistant｜><think>' }}{% endif")
    )
    with pytest.raises(BadConversation, match=r"message 2: .*goes on with '<think>'.*\{% generation %\}"):
        JinjaTemplate(folder).samples(Conversation.of(SIMPLE[1:]))


def test_a_template_that_refuses(folder: Path) -> None:
    released(
        folder,
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% endfor %}",
    )
    with pytest.raises(BadConversation, match="the chat template refuses it: no system here"):
        JinjaTemplate(folder).samples(Conversation.of(SIMPLE))


def test_wrong_files_are_named_before_the_first_conversation(folder: Path, tmp_path: Path) -> None:
    released(folder, "{% for m in messages %}\n{{ m.content }}")
    with pytest.raises(ValueError, match=r"^the chat template for .*, line 2: Unexpected end of template"):
        Rendering(folder).build()
    (tmp_path / "latin.jinja").write_bytes("é{{ messages }}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"^--chat-template .*latin\.jinja: not UTF-8"):
        Rendering(folder, str(tmp_path / "latin.jinja")).build()
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "X"}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer \(data did not match"):
        Rendering(folder).build()


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "list", "file", "ours"])
def test_the_command_with_a_released_tokenizer(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of transformers' tokens, wherever the template is; padding, which is the end token here, is not learnt."""
    tokenizer = released(
        tmp_path / "tokenizer", TOOLS_IN_TOKENS if place == "tokenizer_config.json" else None
    )
    more: list[str] = []
    if place == "chat_template.jinja":
        (tokenizer / "chat_template.jinja").write_text(TOOLS_IN_TOKENS)
    elif place == "list":
        named = [
            {"name": "default", "template": TOOLS_IN_TOKENS},
            {"name": "tool_use", "template": LAST_REASONING},
        ]
        config = json.loads((tokenizer / "tokenizer_config.json").read_text())
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    elif place == "file":
        (tmp_path / "own.jinja").write_text(TOOLS_IN_TOKENS)
        more = ["--chat-template", str(tmp_path / "own.jinja")]
    data = write(tmp_path / "chats.jsonl", [{"messages": SIMPLE}] * 3)
    words = ["--input", str(data), "--tokenizer", str(tokenizer), "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--seq-length", "300", "--valid-fraction", "0", *more]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["chat_template"] == {"ours": "dsv3", "file": str(tmp_path / "own.jinja")}.get(
        place, "of the tokenizer"
    )
    tokens, answers = (np.load(tmp_path / "out" / f"train_{name}.npy") for name in ("tokens", "answers"))
    ends = np.load(tmp_path / "out" / "train_ends.npy")
    encoder = DocumentEncoder(tokenizer)
    first = tokens[0, : ends[0, 0]].tolist()
    if place != "ours":
        expected = rendered(
            tokenizer, SIMPLE, **({"chat_template": TOOLS_IN_TOKENS} if place == "file" else {})
        )
        assert first == expected
    assert encoder.decode(first) == (
        f"{BOS}You write Python.<｜User｜>What is the weather in Paris?<｜Assistant｜>It is sunny, 21 degrees.{EOS}"
        f"<｜User｜>And in Oslo? ünïcödé 漢字<｜Assistant｜>I think so.{EOS}"
    )
    last = int(ends[0][ends[0] < 300].max(initial=0))
    assert (
        set(tokens[0, last:].tolist()) == {encoder.special_ids["<|eos_token|>"]}
        and not answers[0, last:].any()
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_arguments_of_the_template_from_the_record_and_the_command(tmp_path: Path) -> None:
    tokenizer = released(tmp_path / "tokenizer", MARKED)
    data = write(tmp_path / "a.jsonl", [{"messages": REASONED, "chat_template_kwargs": {"thinking": True}}])
    words = ["--tokenizer", str(tokenizer), "--seq-length", "300", "--valid-fraction", "0"]
    assert main(["--input", str(data), *words, "--output-dir", str(tmp_path / "record")]) == 0
    data = write(tmp_path / "b.jsonl", [{"messages": REASONED}])
    assert (
        main(["--input", str(data), *words, "--output-dir", str(tmp_path / "none")]) == 1
    )  # reasoning is left out
    more = ["--template-arguments", '{"thinking": true}']
    assert main(["--input", str(data), *words, "--output-dir", str(tmp_path / "command"), *more]) == 0
    a, b = (np.load(tmp_path / name / "train_tokens.npy") for name in ("record", "command"))
    assert np.array_equal(a, b)


def test_ours_needs_its_tokens_and_a_tokenizer_its_end(tmp_path: Path) -> None:
    tokenizer = released(tmp_path / "tokenizer", None)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<｜User｜>"]
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"--chat-template dsv3: .*lacks the special tokens <｜User｜>"):
        Rendering(tokenizer).build()
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<nowhere>"}))
    with pytest.raises(ValueError, match=r"names no eos_token that tokenizer\.json has"):
        DocumentEncoder(tokenizer)


@pytest.mark.parametrize("template", [TOOLS_IN_TOKENS, LAST_REASONING, MARKED])
def test_a_prompt_is_what_a_server_shows(template, tmp_path):
    """Equal to transformers' `add_generation_prompt`, and the beginning of the sample with the answer."""
    folder = released(tmp_path, template)
    found = Rendering(folder).build()
    for count in (2, 4):
        conversation = Conversation.of(SIMPLE[:count])
        ids = found.prompt(conversation)
        assert ids == rendered(folder, SIMPLE[:count], add_generation_prompt=True)
        whole = found.samples(Conversation.of(SIMPLE[: count + 1]))[-1][0]
        assert whole[: len(ids)] == ids and len(whole) > len(ids)
    with pytest.raises(BadConversation, match="special token"):
        found.prompt(Conversation.of([{"role": "user", "content": f"x{EOS}y"}]))
