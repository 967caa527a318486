"""The forms in which people have conversations, read into one (`conversation.py`).

messages   {"messages": [{"role", "content", …}, …], "tools": […]}: OpenAI's, and that of most chat templates
sharegpt   {"conversations": [{"from": "human"|"gpt"|…, "value"}, …], "system", "tools"}
alpaca     {"instruction", "input", "output", "system", "history": [[question, answer], …]}
"""

from collections.abc import Collection, Mapping
from typing import Any

from dsv3_megatron.data.records import Record
from dsv3_megatron.sft.conversation import (
    BadConversation,
    Conversation,
    Message,
    json_text,
    message,
    text_of,
    tool_list,
)

__all__ = ["FORMATS", "INERT", "conversation"]

FORMATS = ("messages", "sharegpt", "alpaca")

# Keys of a record that say where it is from. Anything else that is not understood is refused, as it may be text.
INERT = frozenset(
    name
    for line in (
        "id idx index uuid uid conversation_id conversation_hash prompt_id session_id source sources dataset",
        "dataset_name origin url license lang language timestamp created_at parallel_tool_calls num_turns n_turns",
    )
    for name in line.split()
)
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function-response", "ipython"), "tool"),
    "system": "system",
}
_SHAREGPT_CALLS = ("function_call", "function-call")


def conversation(record: Record, format: str = "messages", ignored: Collection[str] = ()) -> Conversation:
    """The conversation of a record.

    Args:
        ignored: keys of records and messages that are left out.

    Raises:
        BadConversation: begins with the record's place, and names the key.
    """
    value = {key: item for key, item in record.value.items() if key not in ignored and item is not None}
    try:
        messages, known = _READERS[format](value, ignored)
        tools = None
        for key in ("tools", "functions"):
            if key in value:
                tools = [*(tools or []), *(tool_list(value[key], key) or [])] or None
        arguments = value.get("chat_template_kwargs", {})
        if not isinstance(arguments, dict):
            raise BadConversation(f"chat_template_kwargs is {type(arguments).__name__}, not an object")
        _refuse_unknown(value, {*known, "tools", "functions", "chat_template_kwargs"})
        return Conversation(messages, tools, arguments, record.where)
    except BadConversation as error:
        raise BadConversation(f"{record.where}: {error}") from None


def _refuse_unknown(value: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = [key for key in value if key not in known and key not in INERT]
    if unknown:
        raise BadConversation(
            f"key {', '.join(map(repr, unknown))}: not known, and may be text; --ignore-key {' '.join(unknown)} leaves "
            "it out"
        )


def _without(given: Any, ignored: Collection[str]) -> Any:
    if not isinstance(given, Mapping):
        return given
    return {key: item for key, item in given.items() if key not in ignored}


def _messages(value: dict[str, Any], ignored: Collection[str]) -> tuple[list[Message], set[str]]:
    if "messages" not in value:
        raise BadConversation(f"no key 'messages'{_hint(value)}")
    given = _listed(value["messages"], "messages")
    return [message(_without(item, ignored)) for item in given], {"messages"}


def _sharegpt(value: dict[str, Any], ignored: Collection[str]) -> tuple[list[Message], set[str]]:
    if "conversations" not in value:
        raise BadConversation(f"no key 'conversations'{_hint(value)}")
    found = _system(value)
    for item in _listed(value["conversations"], "conversations"):
        item = _without(item, ignored)
        if not isinstance(item, Mapping) or "from" not in item:
            found.append(message(item))
            continue
        who, said = item["from"], item.get("value")
        rest = {key: part for key, part in item.items() if key not in ("from", "value")}
        unknown = sorted(rest.keys() - {"weight", "loss", "train", "name"})
        if unknown:
            raise BadConversation(f"key {', '.join(map(repr, unknown))} of a message from {who!r}: not known")
        if not isinstance(who, str):
            raise BadConversation(f"from is {type(who).__name__}, not text")
        if who in _SHAREGPT_CALLS:
            found.append(message({**rest, "role": "assistant", "tool_calls": said}))
        elif who in _SHAREGPT_ROLES:
            found.append(message({**rest, "role": _SHAREGPT_ROLES[who], "content": said}))
        else:
            raise BadConversation(
                f"from={who!r}: not one of {', '.join(map(repr, (*_SHAREGPT_ROLES, *_SHAREGPT_CALLS)))}"
            )
    return found, {"conversations", "system"}


def _alpaca(value: dict[str, Any], _: Collection[str]) -> tuple[list[Message], set[str]]:
    for key in ("instruction", "output"):
        if not isinstance(value.get(key), str):
            raise BadConversation(f"no text under {key!r}{_hint(value)}")
    found = _system(value)
    for pair in _listed(value.get("history", []), "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadConversation(f"history: {pair!r} is no pair of question and answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            found.append(message({"role": role, "content": text_of(text, "history")}))
    question = value["instruction"]
    if value.get("input"):
        question = f"{question}\n{text_of(value['input'], 'input')}"
    found.append(message({"role": "user", "content": question}))
    found.append(message({"role": "assistant", "content": value["output"]}))
    return found, {"instruction", "input", "output", "history", "system"}


_READERS = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca}


def _system(value: Mapping[str, Any]) -> list[Message]:
    text = value.get("system")
    return [message({"role": "system", "content": text})] if text else []


def _listed(value: Any, key: str) -> list[Any]:
    if isinstance(value, str):  # a column of JSON text
        value = json_text(value, key)
    if not isinstance(value, list):
        raise BadConversation(f"{key} is {type(value).__name__}, not a list")
    return value


def _hint(value: Mapping[str, Any]) -> str:
    """What the record looks like instead."""
    if "conversations" in value:
        return "; it looks like ShareGPT: --format sharegpt"
    if "instruction" in value and "output" in value:
        return "; it looks like Alpaca: --format alpaca"
    if "messages" in value:
        return "; it has messages: --format messages"
    if "chosen" in value or "rejected" in value:
        return "; it looks like preferences (chosen, rejected), which fine-tuning does not take"
    if "prompt" in value or "question" in value:
        return "; write it as {'messages': [{'role': 'user', …}, {'role': 'assistant', …}]}"
    return f"; the keys are {', '.join(map(repr, value)) or 'none'}"
