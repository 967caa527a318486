"""The forms in which people have preferences, read into one: Hugging Face's preference forms.

explicit  {"prompt", "chosen", "rejected"}: three texts, or three lists of messages
implicit  {"chosen", "rejected"}: both begin with the prompt, as text or as messages
mixed     {"prompt": text, "chosen", "rejected": lists of messages that begin with it} (UltraFeedback's)
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.data.records import Record
from dsv3_megatron.sft.conversation import BadConversation, Conversation, Message, message, tool_list
from dsv3_megatron.sft.formats import INERT

__all__ = ["ConversationPair", "TextPair", "preference"]

_KEYS = ("prompt", "chosen", "rejected")
# Scores that such data sets carry beside the pair; they say nothing that is trained on.
_SCORES = frozenset(
    f"{what}{link}{side}"
    for side in ("chosen", "rejected")
    for what, link in (("score", "_"), ("rating", "_"))
) | frozenset(
    f"{side}{link}{what}" for side in ("chosen", "rejected") for what in ("score", "rating") for link in "_-"
)


@dataclass(frozen=True)
class TextPair:
    """A prompt and two continuations of it, as plain text without a chat template."""

    prompt: str
    chosen: str
    rejected: str
    where: str = ""


@dataclass(frozen=True)
class ConversationPair:
    """Two conversations that differ in what comes after the prompt; only that is learnt (weight 0 elsewhere).

    `empty` says that an answer has no text.
    """

    chosen: Conversation
    rejected: Conversation
    empty: bool = False


def preference(record: Record, ignored: Collection[str] = ()) -> TextPair | ConversationPair:
    """The pair of a record.

    Args:
        ignored: keys that are left out.

    Raises:
        BadConversation: begins with the record's place, and names the key.
    """
    value = {key: item for key, item in record.value.items() if key not in ignored and item is not None}
    try:
        return _pair(value, record.where)
    except BadConversation as error:
        raise BadConversation(f"{record.where}: {error}") from None


def _pair(value: Mapping[str, Any], where: str) -> TextPair | ConversationPair:
    for key in ("chosen", "rejected"):
        if key not in value:
            raise BadConversation(f"no key {key!r}; the keys are {', '.join(map(repr, value)) or 'none'}")
    unknown = [key for key in value if key not in {*_KEYS, *_SCORES, *INERT, "tools"}]
    if unknown:
        raise BadConversation(
            f"key {', '.join(map(repr, unknown))}: not known, and may be text; --ignore-key {' '.join(unknown)} leaves "
            "it out"
        )
    kinds = {key: type(value[key]) for key in _KEYS if key in value}
    if kinds["chosen"] != kinds["rejected"] or kinds["chosen"] not in (str, list):
        raise BadConversation("chosen and rejected: both texts, or both lists of messages")
    if kinds["chosen"] is str:
        if "tools" in value:
            raise BadConversation("tools: only with messages")
        return _texts(value, where)
    return _conversations(value, where)


def _texts(value: Mapping[str, Any], where: str) -> TextPair:
    chosen, rejected = value["chosen"], value["rejected"]
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise BadConversation("prompt: a text, since chosen and rejected are texts")
        return TextPair(value["prompt"], chosen, rejected, where)
    alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[: min(len(chosen), len(rejected)) if alike is None else alike]
    # The prompt ends with a word: "…? Yes" and "…? Yours" share a letter of their answers.
    end = max(shared.rfind(space) for space in " \n") + 1 if chosen != rejected else 0
    if chosen != rejected and end == 0:
        raise BadConversation("no key 'prompt', and chosen and rejected do not begin alike")
    return TextPair(chosen[:end], chosen[end:], rejected[end:], where)


def _conversations(value: Mapping[str, Any], where: str) -> ConversationPair:
    chosen, rejected = ([message(item) for item in value[key]] for key in ("chosen", "rejected"))
    given = value.get("prompt")
    if isinstance(given, list):
        prompt = [message(item) for item in given]
    else:
        prompt, chosen, rejected = _without_prompt(chosen, rejected)
        said = [item.get("content", "") for item in prompt if item["role"] == "user"]
        if isinstance(given, str) and given not in said:
            raise BadConversation("prompt: not what the user says in chosen and rejected")
    tools = tool_list(value["tools"], "tools") if "tools" in value else None
    read = [{**item, "weight": 0} if item["role"] == "assistant" else item for item in prompt]
    # An answer without text is no message of a chat template: the pair is left out before it is rendered.
    empty = not all(any(_says(item) for item in answer) for answer in (chosen, rejected))
    return ConversationPair(
        Conversation([*read, *chosen], tools, where=where),
        Conversation([*read, *rejected], tools, where=where),
        empty,
    )


def _says(item: Message) -> bool:
    return bool(item["role"] == "assistant" and (item.get("content") or item.get("tool_calls")))


def _without_prompt(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages with which both begin, and what comes after in each: an answer first.

    Of equal conversations that is the last answer; such pairs are left out later, and counted.
    """
    found = 0
    for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if place and one["role"] == other["role"] == "assistant":
            found = place
        if one != other:
            break
    if not found:
        raise BadConversation("no key 'prompt', and chosen and rejected do not begin with the same messages")
    return list(chosen[:found]), list(chosen[found:]), list(rejected[found:])
