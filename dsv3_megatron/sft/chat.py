"""Conversations as tokens, in the form of the released tokenizer's chat template.

    <｜begin▁of▁sentence｜>system<｜User｜>question<｜Assistant｜>answer<end>…

`<end>` is the end-of-sequence token, after each answer. Text is encoded piece by piece between the special tokens, and
special tokens written out in it are ordinary text, so no message can imitate another role.
"""

from collections.abc import Callable, Mapping, Sequence

from dsv3_megatron.data.vocabulary import ASSISTANT, BOS, EOS, USER

ROLES = ("system", "user", "assistant")


class BadConversation(ValueError):
    """A conversation cannot be trained on; the text says what is wrong with it."""


def check(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise `BadConversation` unless it is [system,] user, assistant, user, assistant, …, with text everywhere."""
    if not isinstance(messages, Sequence) or not messages:
        raise BadConversation("no messages")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadConversation(f"{message!r}: a message needs a role, one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) or (
            message["role"] != "system" and not message["content"]
        ):
            raise BadConversation(f"a message of the {message['role']} has no text under 'content'")
    turns = [message["role"] for message in messages]
    if turns[0] == "system":
        turns = turns[1:]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadConversation(
            f"roles {', '.join(turns) or 'none'}: user and assistant must take turns, user first"
        )


def conversation_tokens(
    messages: Sequence[Mapping[str, str]],
    encode: Callable[[str], list[int]],
    special_ids: Mapping[str, int],
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are the assistant's to predict: answers with their end token.

    Args:
        messages: `{"role", "content"}` each; see `check`.
        encode: text to ids, without adding or recognising special tokens.
        special_ids: ids of BOS, USER, ASSISTANT and EOS by their names in `data.vocabulary`.
    """
    ids, is_answer = [special_ids[BOS]], [False]

    def add(tokens: list[int], answer: bool = False) -> None:
        ids.extend(tokens)
        is_answer.extend([answer] * len(tokens))

    for message in messages:
        text = encode(message["content"])
        match message["role"]:
            case "system":
                add(text)
            case "user":
                add([special_ids[USER], *text])
            case "assistant":
                add([special_ids[ASSISTANT]])
                add([*text, special_ids[EOS]], answer=True)
    return ids, is_answer
