"""The tokenizer's own chat template (jinja), rendered by transformers, and which of its tokens are the assistant's.

A template says where answers are with `{% generation %}`; where it does not, an answer is what rendering adds to the
prompt for it (`add_generation_prompt`), up to its end token. Many templates leave out what earlier turns thought: the
rendering of a conversation then does not begin with that of its beginning, and each answer becomes a sample of its own,
after just what a server would show the model before it.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from dsv3_megatron.data.tokenizer_files import (
    TOKENIZER_FILE,
    TokenizerError,
    added_tokens,
    chat_template,
    read_json,
    special_tokens,
)
from dsv3_megatron.data.vocabulary import LOOKS_SPECIAL
from dsv3_megatron.sft.conversation import REASONING, BadConversation, Conversation, Message, weight_of
from dsv3_megatron.sft.kept import Kept

__all__ = ["JinjaTemplate", "Sample"]

Sample = tuple[list[int], list[bool]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class JinjaTemplate:
    """A chat template with its tokenizer.

    Args:
        folder: tokenizer folder.
        template: jinja text, or templates by name; the folder's own by default.
        arguments: further variables of the template, for every conversation.
        allow_special: special tokens in messages are what they are, instead of an error.

    Attributes:
        notes: what is worth a word and no error, with how often it was seen.

    Raises:
        TokenizerError: the folder has no template or a wrong one, or names a token that it has not.
    """

    def __init__(
        self,
        folder: Path,
        template: str | dict[str, str] | None = None,
        arguments: Mapping[str, Any] | None = None,
        allow_special: bool = False,
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        template = template or chat_template(folder)
        if not template:
            raise TokenizerError(f"{folder}: has no chat template: give one with --chat-template")
        self.notes: Counter[str] = Counter()
        self._texts = list(template.values()) if isinstance(template, dict) else [template]
        self._marks_answers = any(_GENERATION.search(text) for text in self._texts)
        self._arguments = dict(arguments or {})
        # Not AutoTokenizer, which for some class names makes another tokenizer than the one in the file.
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / TOKENIZER_FILE), chat_template=template, model_max_length=10**18
        )
        known, named = self._tokenizer.get_vocab(), special_tokens(folder)
        for role in ("bos_token", "eos_token"):
            if named.get(role, "") not in {"", *known}:
                raise TokenizerError(f"{folder}: {role} {named[role]!r} is not in {TOKENIZER_FILE}")
        named = {role: token for role, token in named.items() if token in known}
        self._tokenizer.add_special_tokens(named)
        self._ends = _ends(folder, known.get(named.get("eos_token", "")))
        self._special = None if allow_special else _special_pattern(folder, named.values())
        self._check_syntax(folder)
        self._kept = Kept(lambda conversation, end: self._text(conversation, end))

    def samples(self, conversation: Conversation) -> list[Sample]:
        """(token ids, which are learnt) of the conversation: one sample, or one per answer, see the module.

        Raises:
            BadConversation: it cannot be rendered, or not all of it is.
        """
        self._check(conversation)
        messages = conversation.messages
        answers = [number for number, item in enumerate(messages) if item["role"] == "assistant"]
        whole = self._text(conversation, len(messages))
        until = {number: self._text(conversation, number + 1) for number in answers}
        learnt = [number for number in answers if weight_of(messages[number])]
        if all(whole.startswith(text) for text in until.values()):
            texts = [whole]
            spans = [span for number in learnt for span in self._spans(conversation, number, until[number])]
            samples = [self._sample(whole, spans)]
        else:
            texts = [until[number] for number in answers]
            samples = [self._sample(until[n], self._spans(conversation, n, until[n])) for n in learnt]
            self.notes[
                "conversations with one sample per answer, as the chat template changes earlier turns"
            ] += 1
        self._kept.check(conversation, texts)
        if any(_quotes_arguments(conversation, text) for text in texts):
            self.notes[
                "conversations whose calls have JSON text as arguments, which the chat template quotes"
            ] += 1
        return [sample for sample in samples if any(sample[1])]

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the next answer begins, as a server shows them to the model.

        Raises:
            BadConversation: it cannot be rendered.
        """
        self._check(conversation.answered())
        text = self._text(conversation, len(conversation.messages), prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_syntax(self, folder: Path) -> None:
        """A template that cannot be read is no fault of the first conversation."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        for text in self._texts:
            try:
                render_jinja_template([[]], chat_template=text)
            except jinja2.TemplateSyntaxError as error:
                raise TokenizerError(
                    f"the chat template for {folder}, line {error.lineno}: {error.message}"
                ) from None
            except Exception:  # without messages it need not render
                continue

    def _check(self, conversation: Conversation) -> None:
        """What no template would notice."""
        messages = conversation.messages
        if not messages:
            raise BadConversation("no messages")
        roles = [item["role"] for item in messages]
        if roles[-1] != "assistant" or roles[0] == "assistant":
            raise BadConversation(
                f"roles {', '.join(roles)}: the first message must not be the assistant's, and the last must be"
            )
        if not any(weight_of(item) for item in messages if item["role"] == "assistant"):
            raise BadConversation("every answer has weight 0: there is nothing to learn")
        for number, item in enumerate(messages, 1):
            texts = [item.get(key) for key in ("content", *REASONING)]
            if not any(texts) and not item.get("tool_calls") and item["role"] not in ("tool", "system"):
                raise BadConversation(f"message {number}, of the {item['role']}, has no text under 'content'")
            for text in texts:
                match = self._special.search(text) if self._special and text else None
                if match:
                    raise BadConversation(
                        f"message {number}, of the {item['role']}, holds the special token {match[0]!r}, which would "
                        "be one and not text: --allow-special-tokens if it is meant"
                    )
        for key in {**self._arguments, **conversation.template_arguments}:
            if not any(re.search(rf"\b{re.escape(key)}\b", text) for text in self._texts):
                raise BadConversation(f"chat_template_kwargs: the chat template does not look at {key!r}")

    def _spans(self, conversation: Conversation, number: int, text: str) -> list[Span]:
        """Where answer `number` is in the text, which ends with it."""
        if self._marks_answers:
            before = self._text(conversation, number)
            start = len(before) if text.startswith(before) else len(_common(before, text))
            return [span for span in self._marked(conversation, number + 1) if span[0] >= start]
        prompt = self._text(conversation, number, prompt=True)
        if not text.startswith(prompt):
            raise BadConversation(
                f"message {number + 1}: the chat template renders the answer otherwise than it asks for it (the prompt "
                f"goes on with {prompt[len(_common(prompt, text)) :]!r}): use a template with {{% generation %}}, or "
                "--template-arguments"
            )
        return [(len(prompt), len(text))]

    def _sample(self, text: str, spans: Sequence[Span]) -> Sample:
        """Tokens as `apply_chat_template` makes them; learnt is a token that reaches into a span.

        Where the template does not mark answers, they end with their last end token: the line break that some write
        after it the model need not say.
        """
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        learnt = [False] * len(ids)
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
            ends = [i for i in inside if ids[i] in self._ends]
            if not ends:
                self.notes["answers without an end token, after which generation does not stop"] += 1
            for i in inside:
                learnt[i] = self._marks_answers or not ends or i <= ends[-1]
        return ids, learnt

    def _text(self, conversation: Conversation, end: int, prompt: bool = False) -> str:
        """The first `end` messages rendered, with the prompt for an answer on demand."""
        import jinja2

        messages, tools = _given(conversation, end), conversation.tools and list(conversation.tools)
        arguments = {**self._arguments, **conversation.template_arguments}
        try:
            try:
                return self._tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **arguments
                )
            except (jinja2.UndefinedError, TypeError):
                return self._rendered(_for_older_templates(messages), tools, prompt, arguments)[0]
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise BadConversation(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    def _marked(self, conversation: Conversation, end: int) -> list[Span]:
        """The spans that the template marks as the assistant's."""
        import jinja2

        messages, tools = _given(conversation, end), conversation.tools and list(conversation.tools)
        messages = [{key: value for key, value in item.items() if value is not None} for item in messages]
        arguments = {**self._arguments, **conversation.template_arguments}
        try:
            return self._rendered(messages, tools, False, arguments)[1]
        except (jinja2.UndefinedError, TypeError):
            return self._rendered(_for_older_templates(messages), tools, False, arguments)[1]

    def _rendered(
        self, messages: list[Message], tools: Any, prompt: bool, arguments: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        """Text and marked spans, below `apply_chat_template`, which leaves out null values."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=self._tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=self._marks_answers,
            add_generation_prompt=prompt,
            **{**self._tokenizer.special_tokens_map, **arguments},
        )
        return texts[0], [(start, end) for start, end in (spans[0] if spans else [])]


def _given(conversation: Conversation, end: int) -> list[Message]:
    return [{k: v for k, v in item.items() if k != "weight"} for item in conversation.messages[:end]]


def _for_older_templates(messages: Sequence[Message]) -> list[Message]:
    """Null content where there is none, for which some ask, and arguments of calls as JSON text, which some join."""
    found = []
    for item in messages:
        item = {"content": None, **deepcopy(item)}
        for call in item.get("tool_calls") or []:
            if not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        found.append(item)
    return found


def _quotes_arguments(conversation: Conversation, text: str) -> bool:
    """Whether the arguments of a call are text, and in the rendering a quoted string."""
    calls = (call for item in conversation.messages for call in item.get("tool_calls") or [])
    texts = (
        call["function"]["arguments"] for call in calls if isinstance(call["function"]["arguments"], str)
    )
    return any('"' in arguments and json.dumps(arguments, ensure_ascii=False) in text for arguments in texts)


def _ends(folder: Path, eos: int | None) -> set[int]:
    """Ids at which a generation stops."""
    ends = set() if eos is None else {eos}
    for name in ("generation_config.json", "config.json"):
        given = (read_json(folder / name) or {}).get("eos_token_id")
        ends.update(given if isinstance(given, list) else [given] if isinstance(given, int) else [])
    return ends


def _special_pattern(folder: Path, named: Any) -> re.Pattern[str] | None:
    """Finds the tokenizer's special tokens in a text."""
    added = added_tokens(folder)
    special = {t["content"] for t in added if t.get("special") or LOOKS_SPECIAL.fullmatch(t["content"])}
    words = sorted({*special, *named}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


def _common(a: str, b: str) -> str:
    """The longest text that both begin with."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
