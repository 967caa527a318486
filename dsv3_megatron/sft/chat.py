"""Our own chat template in tokens, in the form of the released tokenizer's.

    <｜begin▁of▁sentence｜>system<｜User｜>question<｜Assistant｜>answer<end>…

`<end>` is the end-of-sequence token, after each answer. Reasoning, calls of tools and their results are ordinary text
in the place of an answer and of a question. Text is encoded piece by piece between the special tokens, and special
tokens written out in it are ordinary text, so no message can imitate another role. The same as a jinja template, for
whoever serves the model, is `data.vocabulary.CHAT_TEMPLATE`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv3_megatron.data.vocabulary import ASSISTANT, BOS, CALLS_HELP, EOS, TOOLS_HELP, USER
from dsv3_megatron.sft.conversation import REASONING, BadConversation, weight_of

__all__ = ["ROLES", "BadConversation", "check", "conversation_tokens"]

ROLES = ("system", "user", "assistant", "tool")
_KNOWN = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "tool_calls", "weight", *REASONING},
    "tool": {"role", "content", "name", "tool_call_id"},
}


def check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `BadConversation` unless the messages are [system,] then turns of user and assistant, text everywhere.

    An assistant that calls tools is followed by their results (`tool`), and answers then. Some answer must be learnt.
    """
    if not isinstance(messages, Sequence) or not messages:
        raise BadConversation("no messages")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadConversation(f"{message!r}: a message needs a role, one of {', '.join(ROLES)}")
        _check_message(message)
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    expected: tuple[str, ...] = ("user",)
    for message in turns:
        if message["role"] not in expected:
            break
        expected = _followers(message)
    else:
        if turns and turns[-1]["role"] == "assistant":
            if not any(weight_of(message) for message in turns if message["role"] == "assistant"):
                raise BadConversation("every answer has weight 0: there is nothing to learn")
            return
    roles = [message["role"] for message in turns]
    text = f"roles {', '.join(roles) or 'none'}: user and assistant must take turns, user first"
    if "tool" in roles:
        text += f"; tool, one of {', '.join(ROLES)}, follows an assistant's tool_calls"
    raise BadConversation(text)


def _followers(message: Mapping[str, Any]) -> tuple[str, ...]:
    """Roles that may come after a message."""
    if message["role"] == "user":
        return ("assistant",)
    if message["role"] == "tool":
        return ("tool", "assistant")
    return ("tool", "user") if message.get("tool_calls") else ("user",)


def _check_message(message: Mapping[str, Any]) -> None:
    role = message["role"]
    unknown = sorted(
        key for key, value in message.items() if key not in _KNOWN[role] and value not in (None, [], {}, "")
    )
    if unknown:
        raise BadConversation(
            f"key {', '.join(map(repr, unknown))} of the {role}: our template does not know it, and it may be text; "
            f"--ignore-key {' '.join(unknown)} leaves it out"
        )
    has_other = role == "assistant" and (message.get("tool_calls") or _reasoning(message))
    content = message.get("content")
    if has_other and content is None:
        return
    if not isinstance(content, str) or (not content and not has_other and role in ("user", "assistant")):
        raise BadConversation(f"a message of the {role} has no text under 'content'")


def _reasoning(message: Mapping[str, Any]) -> str:
    return next((message[key] for key in REASONING if message.get(key)), "")


def conversation_tokens(
    messages: Sequence[Mapping[str, Any]],
    encode: Callable[[str], list[int]],
    special_ids: Mapping[str, int],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are learnt: the assistant's answers with their end token, but for
    those of weight 0.

    Args:
        messages: see `check`.
        encode: text to ids, without adding or recognising special tokens.
        special_ids: ids of BOS, USER, ASSISTANT and EOS by their names in `data.vocabulary`.
        tools: JSON schemas of functions.
    """
    ids, is_answer = [special_ids[BOS]], [False]

    def add(tokens: list[int], answer: bool = False) -> None:
        ids.extend(tokens)
        is_answer.extend([answer] * len(tokens))

    system = "".join(message["content"] for message in messages if message["role"] == "system")
    add(encode(system + _tools(tools, bool(system))))
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(_result(message))
            continue
        if results:
            add([special_ids[USER], *encode("".join(results))])
            results = []
        if message["role"] == "user":
            add([special_ids[USER], *encode(message["content"])])
        elif message["role"] == "assistant":
            add([special_ids[ASSISTANT]])
            add([*encode(_answer(message)), special_ids[EOS]], answer=bool(weight_of(message)))
    return ids, is_answer


def _tools(tools: Sequence[Mapping[str, Any]] | None, after_text: bool) -> str:
    if not tools:
        return ""
    listed = "".join(_json(tool) + "\n" for tool in tools)
    return ("\n\n" if after_text else "") + TOOLS_HELP + listed + CALLS_HELP


def _answer(message: Mapping[str, Any]) -> str:
    reasoning, parts = _reasoning(message), []
    if reasoning:
        parts.append(f"<think>\n{reasoning}\n</think>\n\n")
    parts.append(message.get("content") or "")
    for call in message.get("tool_calls") or []:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else _json(arguments)
        parts.append(
            f'\n<tool_call>\n{{"name": {_json(function["name"])}, "arguments": {text}}}\n</tool_call>'
        )
    return "".join(parts)


def _result(message: Mapping[str, Any]) -> str:
    name = f"{message['name']}: " if message.get("name") else ""
    return f"<tool_response>\n{name}{message['content']}\n</tool_response>\n"


def _json(value: Any) -> str:
    """As transformers' `tojson` in a template."""
    return json.dumps(value, ensure_ascii=False)
