"""A tokenizer of Hugging Face's files, with its chat template; no network, no transformers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from dsv3_megatron.errors import RefusedArgument

__all__ = ["TOKENIZER_FILE", "Message", "Tokenizer", "check_messages"]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


class Tokenizer:
    """Text to ids and back, conversations to ids.

    Args:
        folder: with tokenizer.json, and tokenizer_config.json for special tokens and chat template.

    Attributes:
        bos_id, eos_id: None where the configuration names none.
        chat_template: Jinja source, None where there is none.

    Raises:
        RefusedArgument: tokenizer.json is not one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._encoder = Encoder.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # tokenizers raises plain Exception
            raise RefusedArgument(f"{folder / TOKENIZER_FILE}: {error}") from error
        self._config = _json(folder / CONFIG_FILE)
        self.bos_id, self.eos_id = self._special("bos_token"), self._special("eos_token")
        template = folder / TEMPLATE_FILE
        self.chat_template: str | None = (
            template.read_text() if template.exists() else self._config.get("chat_template")
        )
        self._special_texts = [token.content for token in self._encoder.get_added_tokens_decoder().values()]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Tokenizer, (self.folder,)

    def _special(self, key: str) -> int | None:
        text = self._special_text(key)
        return self._encoder.token_to_id(text) if text else None

    def _special_text(self, key: str) -> str:
        value = self._config.get(key) or ""
        return value["content"] if isinstance(value, dict) else value

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, special tokens in it recognised, with a beginning token where the tokenizer adds one."""
        ids = self._encoder.encode(text).ids
        if self._config.get("add_bos_token") and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens."""
        return self._encoder.decode(list(ids), skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """Text of one token, special ones written out."""
        return self._encoder.decode([token], skip_special_tokens=False)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer begins.

        A message's text is encoded by itself where it stands between special tokens, as in DeepSeek's template, and
        special tokens written out in it are ordinary text: no message can imitate another role.

        Raises:
            RefusedArgument: there is no template, or it does not take these messages.
        """
        marked = [{**message, "content": _mark(number)} for number, message in enumerate(messages)]
        rendered = self._render(marked)
        pieces = self._between_marks(rendered, messages)
        if pieces is None:
            return self._encoder.encode(self._render(messages), add_special_tokens=False).ids
        ids: list[int] = []
        for text, is_message in pieces:
            self._encoder.encode_special_tokens = is_message
            try:
                ids += self._encoder.encode(text, add_special_tokens=False).ids
            finally:
                self._encoder.encode_special_tokens = False
        return ids

    def _render(self, messages: Sequence[Message]) -> str:
        if self.chat_template is None:
            raise RefusedArgument(
                f"{self.folder}: no chat template ({CONFIG_FILE} or {TEMPLATE_FILE}): fine-tune on conversations, or "
                "use plain prompts (dsv3 generate)"
            )
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self._special_text("bos_token"),
                eos_token=self._special_text("eos_token"),
            )
        except TemplateError as error:
            raise RefusedArgument(f"the chat template does not take these messages: {error}") from error

    def _between_marks(self, rendered: str, messages: Sequence[Message]) -> list[tuple[str, bool]] | None:
        """(text, whether it is a message's) in order; None where a message is not between special tokens."""
        pieces: list[tuple[str, bool]] = []
        rest = rendered
        for number, message in enumerate(messages):
            if rest.count(_mark(number)) != 1 or rendered.count(_mark(number)) != 1:
                return None
            before, rest = rest.split(_mark(number))
            if not (self._ends_special(before) and self._begins_special(rest, number + 1 < len(messages))):
                return None
            pieces += [(before, False), (message["content"], True)]
        return [piece for piece in (*pieces, (rest, False)) if piece[0]]

    def _ends_special(self, text: str) -> bool:
        return text == "" or text.endswith(tuple(self._special_texts))

    def _begins_special(self, text: str, more: bool) -> bool:
        return text.startswith(tuple(self._special_texts)) or (text == "" and not more)


def _mark(number: int) -> str:
    """Stands for a message while the template is rendered: private-use characters, so in no template."""
    return f"\ue000{number}\ue001"


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError:
        return {}
    except ValueError as error:
        raise RefusedArgument(f"{path}: corrupt JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def check_messages(messages: Any) -> None:
    """Raise `RefusedArgument` unless they are a list of `{"role", "content"}` that ends with the user's."""
    if not isinstance(messages, list) or not messages:
        raise RefusedArgument("messages: give a list of {'role', 'content'}, at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RefusedArgument(f"messages[{number}]: role must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RefusedArgument(f"messages[{number}]: content must be a text")
    if messages[-1]["role"] != "user":
        raise RefusedArgument("messages: the last one must be the user's")
