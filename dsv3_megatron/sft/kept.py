"""Whether a rendered conversation still says everything: no text is left out, and every further key changes it.

A chat template may ignore what it does not know (tools, a name, reasoning). What it ignores would be missing in
training without a word, so it is an error that names message and key.
"""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from dsv3_megatron.sft.conversation import REASONING, BadConversation, Conversation, Message

__all__ = ["Kept"]

# Keys that say how messages belong together, which a template may do without, and those looked at otherwise.
_NOT_ASKED = {"role", "content", "weight", "tool_call_id", *REASONING}
_MARK = "qzxjv"  # stands in no text
_SHORT = 16  # characters: a shorter text is found anywhere


class Kept:
    """The check of one template.

    Args:
        render: (conversation, number of its first messages) → text. Raises BadConversation.
    """

    def __init__(self, render: Callable[[Conversation, int], str]) -> None:
        self._render = render
        # (key, circumstances) in which a template is known to look at a key: conversations are many, and much alike.
        self._known: set[tuple[Any, ...]] = set()

    def check(self, conversation: Conversation, texts: Sequence[str]) -> None:
        """Raise BadConversation unless all of the conversation is in one of the texts."""
        for number, item in enumerate(conversation.messages):
            for key in ("content", *REASONING):
                text = (item.get(key) or "").strip()
                if text and (len(text) < _SHORT or not any(text in rendered for rendered in texts)):
                    self._check_text(conversation, number, key, cached=len(text) < _SHORT)
            for key in sorted(item.keys() - _NOT_ASKED):
                if key == "tool_calls":
                    self._check_calls(conversation, number)
                elif item[key] not in (False, 0, "", [], {}) and not _names_a_call(conversation, item, key):
                    self._check_key(conversation, number, key)
        if conversation.tools:
            self._check_changes(conversation, _with(conversation, tools=None), None, "tools", ("tools",))

    def _check_text(self, conversation: Conversation, number: int, key: str, cached: bool) -> None:
        """A text that is not found as it is (short, escaped) is whole if what is put before and after it is there."""
        where = (key, *_circumstances(conversation, number))
        if cached and where in self._known:
            return
        for place in ("before", "after"):
            messages = deepcopy(list(conversation.messages))
            text = messages[number][key]
            messages[number][key] = _MARK + text if place == "before" else text + _MARK
            if _MARK not in self._render(_with(conversation, messages=messages), _end(messages, number)):
                left_out = (
                    f"--ignore-key {key} if that is meant, or another" if key in REASONING else "use another"
                )
                raise BadConversation(
                    f"message {number + 1}, of the {messages[number]['role']}: the chat template leaves out a part of "
                    f"{key!r}: {left_out} --chat-template"
                )
        if cached:
            self._known.add(where)

    def _check_key(self, conversation: Conversation, number: int, key: str) -> None:
        changed = deepcopy(list(conversation.messages))
        del changed[number][key]
        where = (key, *_circumstances(conversation, number))
        self._check_changes(conversation, _with(conversation, messages=changed), number, key, where)

    def _check_calls(self, conversation: Conversation, number: int) -> None:
        """Each call's name and arguments."""
        calls = conversation.messages[number]["tool_calls"]
        for index, call in enumerate(calls):
            for part in ("name", "arguments"):
                before = call["function"][part]
                if before in ({}, "{}", ""):
                    continue
                other: Any = _MARK if part == "name" else {_MARK: 1}
                changed = deepcopy(list(conversation.messages))
                changed[number]["tool_calls"][index]["function"][part] = (
                    json.dumps(other) if part == "arguments" and isinstance(before, str) else other
                )
                where = ("tool_calls", part, index, len(calls), *_circumstances(conversation, number))
                self._check_changes(
                    conversation,
                    _with(conversation, messages=changed),
                    number,
                    f"{part} of a tool call",
                    where,
                )

    def _check_changes(
        self,
        conversation: Conversation,
        other: Conversation,
        number: int | None,
        key: str,
        where: tuple[Any, ...],
    ) -> None:
        """Raise unless the other conversation, which differs by the key, has another rendering."""
        if where in self._known:
            return
        end = len(conversation.messages) if number is None else _end(conversation.messages, number)
        try:
            same = self._render(conversation, end) == self._render(other, end)
        except BadConversation:  # the template cannot do without, so it looks at it
            same = False
        if same:
            message = (
                ""
                if number is None
                else f"message {number + 1}, of the {conversation.messages[number]['role']}: "
            )
            name = key.split()[-1] if " " not in key else "tool_calls"
            raise BadConversation(
                f"{message}the chat template leaves out {key!r}: --ignore-key {name} if that is meant, or another "
                "--chat-template"
            )
        self._known.add(where)


def _names_a_call(conversation: Conversation, item: Message, key: str) -> bool:
    """Whether a result only says which call it is of, like `tool_call_id`: the name stands in the call."""
    calls = (call for other in conversation.messages for call in other.get("tool_calls") or [])
    return item["role"] == "tool" and key == "name" and any(c["function"]["name"] == item[key] for c in calls)


def _with(conversation: Conversation, **changes: Any) -> Conversation:
    return Conversation(
        changes.get("messages", conversation.messages),
        changes.get("tools", conversation.tools),
        conversation.template_arguments,
        conversation.where,
    )


def _end(messages: Sequence[Message], number: int) -> int:
    """Messages up to the first answer from this one on: what a template shows there it may leave out later."""
    following = (i for i, item in enumerate(messages) if i >= number and item["role"] == "assistant")
    return next(following, len(messages) - 1) + 1


def _circumstances(conversation: Conversation, number: int) -> tuple[Any, ...]:
    """What a template may decide by: the message and its neighbours by role and keys, whether it is first or last."""
    messages = conversation.messages
    near = tuple((item["role"], tuple(sorted(item))) for item in messages[max(0, number - 1) : number + 2])
    return near, number == 0, number == len(messages) - 1, conversation.tools is None
