"""A conversation as it is trained on, whatever form a file had it in; every key is understood or refused by name.

A message is `{"role", "content"}` and, where it has them, `reasoning_content`, `tool_calls`, `name`, `tool_call_id`,
`weight` (0: an answer that is read and not learnt). Other keys stay, for a chat template that knows them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsv3_megatron.data.errors import InputError
from dsv3_megatron.data.records import parsed

__all__ = [
    "REASONING",
    "BadConversation",
    "Conversation",
    "Message",
    "json_text",
    "message",
    "text_of",
    "tool_list",
    "weight_of",
]

Message = dict[str, Any]

# What people call what an assistant thought before it answered.
REASONING = ("reasoning_content", "reasoning", "thinking")
# What people call whether an answer is learnt.
_WEIGHTS = ("weight", "loss", "train")


class BadConversation(ValueError):
    """A conversation cannot be trained on; the text says what is wrong with it."""


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: in order, each made by `message`.
        tools: JSON schemas of the functions that may be called.
        template_arguments: further variables for a chat template (`chat_template_kwargs`).
        where: `file:line`.
    """

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @classmethod
    def of(cls, given: "Conversation | Sequence[Mapping[str, Any]]") -> "Conversation":
        """A conversation, or a list of messages as one."""
        return given if isinstance(given, Conversation) else cls([message(item) for item in given])

    def answered(self, content: str = "answer") -> "Conversation":
        """The same with one more answer. BadConversation where there is nothing to answer."""
        if not self.messages:
            raise BadConversation("no messages")
        return replace(self, messages=[*self.messages, {"role": "assistant", "content": content}])


def message(given: Any) -> Message:
    """A message in the module's form; null values are as absent keys.

    Raises:
        BadConversation: names the key that is wrong.
    """
    if not isinstance(given, Mapping):
        raise BadConversation(f"{given!r}: a message is an object with role and content")
    found = {key: value for key, value in given.items() if value is not None}
    role = found.get("role")
    if not isinstance(role, str):
        raise BadConversation(
            f"{_shown(given)}: a message needs a role, one of system, user, assistant, tool"
        )
    if role == "function":  # OpenAI's earlier name
        found["role"] = role = "tool"
    if "content" in found:
        found["content"] = text_of(found["content"], "content")
    call = found.pop("function_call", None)  # likewise
    if call is not None:
        if "tool_calls" in found:
            raise BadConversation(
                f"function_call and tool_calls of the {role}: one of the two says the calls"
            )
        found["tool_calls"] = [call]
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"])
        if not found["tool_calls"]:
            del found["tool_calls"]
    for key in (*REASONING, "name", "tool_call_id"):
        if key in found and not isinstance(found[key], str):
            raise BadConversation(f"{key} of the {role} is {type(found[key]).__name__}, not text")
    for key in REASONING:
        if found.get(key) == "":
            del found[key]
    weight = _weight(found, role)
    if weight is not None:
        found["weight"] = weight
    return found


def text_of(value: Any, key: str) -> str:
    """Text, or the joined texts of a list of parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadConversation(f"{key} is {type(value).__name__}, not text")
    texts = []
    for part in value:
        if isinstance(part, Mapping):
            kind = part.get("type", "text")
            if kind != "text" or not isinstance(part.get("text"), str):
                raise BadConversation(f"{key} has a part of type {kind!r}; only text can be trained on")
            extra = sorted(part.keys() - {"type", "text"} - {k for k, v in part.items() if v is None})
            if extra:
                raise BadConversation(f"{key} has a part with {extra}: not known")
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            raise BadConversation(f"{key} has a part that is {type(part).__name__}, not text")
    return "".join(texts)


def json_text(text: str, key: str) -> Any:
    """The value of a key that people write as JSON text, read as strictly as the file around it."""
    try:
        return parsed(text, key)
    except InputError as error:
        raise BadConversation(f"{error}: the text of {key} must be JSON") from None


def weight_of(item: Mapping[str, Any]) -> int:
    """Whether an assistant's message is learnt: 1 or 0."""
    return int(item.get("weight", 1))


def tool_list(value: Any, key: str) -> list[dict[str, Any]] | None:
    """`tools` (or the earlier `functions`) of a record: a list of schemas, or JSON text of one; None for none."""
    if isinstance(value, str):
        if not value.strip():
            return None
        value = json_text(value, key)
    if not value:
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadConversation(f"{key} must be a list of objects")
    if key == "functions":
        return [{"type": "function", "function": tool} for tool in value]
    return value


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Calls as `{"type": "function", "function": {"name", "arguments"}}`, with their `id` where they have one."""
    if isinstance(value, str):
        value = json_text(value, "tool_calls")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadConversation(f"tool_calls is {type(value).__name__}, not a list")
    calls = []
    for call in value:
        if not isinstance(call, Mapping):
            raise BadConversation(f"tool_calls: {call!r} is no object")
        call = {key: item for key, item in call.items() if item is not None}
        if call.get("type", "function") != "function":
            raise BadConversation(f"tool_calls: a call of type {call['type']!r}; only functions are known")
        function = call.pop("function", None)
        if function is None:
            function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        extra = sorted(call.keys() - {"id", "type", "index"})
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadConversation(
                f"tool_calls: {_shown(call | {'function': function})} has no name of a function"
            )
        extra += sorted(function.keys() - {"name", "arguments"})
        if extra:
            raise BadConversation(f"tool_calls: {extra} of {function['name']!r} are not known")
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, str | Mapping):
            raise BadConversation(
                f"tool_calls: arguments of {function['name']!r} are {type(arguments).__name__}"
            )
        call["type"] = "function"
        call["function"] = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        calls.append(call)
    return calls


def _weight(found: Message, role: str) -> int | None:
    """The one weight of a message, taken out of it; None without any."""
    given = {key: found.pop(key) for key in _WEIGHTS if key in found}
    for key, value in given.items():
        if isinstance(value, str) or value not in (0, 1):
            raise BadConversation(
                f"{key}={value!r} of the {role}: 0 (not learnt) or 1; a loss has no other weights here"
            )
    if len(set(map(int, given.values()))) > 1:
        raise BadConversation(f"{' and '.join(given)} of the {role} disagree")
    if not given:
        return None
    weight = int(next(iter(given.values())))
    if role != "assistant":
        if weight:
            raise BadConversation(
                f"{next(iter(given))}=1 of the {role}: only an assistant's messages are learnt"
            )
        return None
    return weight


def _shown(value: Any, longest: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
