"""A released or our own tokenizer: text to ids and back, conversations to the ids that the model was fine-tuned on."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from dsv3_megatron.data.tokenizer_files import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    TokenizerError,
    chat_template,
    read_json,
    special_tokens,
)
from dsv3_megatron.data.vocabulary import ASSISTANT, BOS, USER
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.sft.conversation import BadConversation, Conversation
from dsv3_megatron.sft.rendering import Ours, Rendering
from dsv3_megatron.sft.template import JinjaTemplate

__all__ = ["TOKENIZER_FILE", "Message", "Tokenizer"]

Message = Mapping[str, Any]


class Tokenizer:
    """Text to ids and back, conversations to ids.

    Args:
        folder: with tokenizer.json, and the files beside it that name special tokens and the chat template.

    Attributes:
        eos_id: None where the files name none.

    Raises:
        RefusedArgument: the files are no tokenizer.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._encoder = Encoder.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # tokenizers raises plain Exception
            raise RefusedArgument(f"{folder / TOKENIZER_FILE}: {error}") from error
        try:
            self._config = read_json(folder / TOKENIZER_CONFIG) or {}
            named = special_tokens(folder)
        except TokenizerError as error:
            raise RefusedArgument(str(error)) from error
        self._bos_id, self.eos_id = (self._id(named.get(role)) for role in ("bos_token", "eos_token"))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Tokenizer, (self.folder,)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._encoder.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._encoder.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, special tokens in it recognised, with a beginning token where the tokenizer adds one."""
        ids = self._encoder.encode(text).ids
        if self._config.get("add_bos_token") and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens."""
        return self._encoder.decode(list(ids), skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """Text of one token, special ones written out."""
        return self._encoder.decode([token], skip_special_tokens=False)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer begins: those of fine-tuning (`sft.rendering`).

        The template is the tokenizer's own, or ours where it has none. No message can imitate another role: in our
        template special tokens in a message are ordinary text, with another template they are refused.

        Raises:
            RefusedArgument: there is no template, or it does not take these messages.
        """
        try:
            return self._template.prompt(Conversation.of(messages))
        except BadConversation as error:
            raise RefusedArgument(str(error)) from error

    @property
    def has_chat(self) -> bool:
        """Whether there is a template to talk by."""
        try:
            return self._template is not None
        except RefusedArgument:
            return False

    @functools.cached_property
    def _template(self) -> Ours | JinjaTemplate:
        try:
            if chat_template(self.folder) is None and None in map(self._id, (BOS, USER, ASSISTANT)):
                raise TokenizerError(
                    f"{self.folder}: no chat template ({TOKENIZER_CONFIG} or chat_template.jinja): fine-tune on "
                    "conversations, or use plain prompts (dsv3 generate)"
                )
            return Rendering(self.folder).build()
        except TokenizerError as error:
            raise RefusedArgument(str(error)) from error
        except ImportError as error:
            raise RefusedArgument(
                f"{self.folder}: its chat template needs transformers: pip install 'transformers>=4.53'"
            ) from error
