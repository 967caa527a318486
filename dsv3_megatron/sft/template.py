"""The tokenizer's own chat template (jinja), rendered by transformers, and which of its tokens are the assistant's.

A template says where answers are with `{% generation %}`; where it does not, an answer is what rendering adds to the
prompt for it (`add_generation_prompt`), up to its end token. Many templates leave out what earlier turns thought: the
rendering of the whole conversation then does not begin with that of its beginning, and each answer becomes a sample of its
own, after just what a server would show the model before it.

Text that a template leaves out is an error: every message must be in what is trained on, and every further key must change
it.
"""

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from dsv3_megatron.data.tokenizer_files import TOKENIZER_FILE, TokenizerError, chat_template, read_json, special_tokens
from dsv3_megatron.sft.conversation import REASONING, BadConversation, Conversation, Message, weight_of

__all__ = ["JinjaTemplate", "Sample"]

Sample = tuple[list[int], list[bool]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Keys that say how messages belong together; a template may do without.
_LINKS = ("tool_call_id", "role", "content", "weight")
_MARK = "qzxjv"


class JinjaTemplate:
    """A chat template with its tokenizer.

    Args:
        folder: tokenizer folder.
        template: jinja text, or templates by name; the folder's own by default.
        allow_special: special tokens in messages are what they are, instead of an error.

    Raises:
        TokenizerError: the folder has no template, or names a token that it has not.
    """

    def __init__(
        self, folder: Path, template: str | dict[str, str] | None = None, allow_special: bool = False
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        self.template = template or chat_template(folder)
        if not self.template:
            raise TokenizerError(f"{folder}: has no chat template: give one with --chat-template")
        content = read_json(folder / TOKENIZER_FILE) or {}
        added = {token["content"]: token for token in content.get("added_tokens") or []}
        named = special_tokens(folder)
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / TOKENIZER_FILE), chat_template=self.template, model_max_length=10**18
        )
        known = self._tokenizer.get_vocab()
        for role in ("bos_token", "eos_token"):
            if named.get(role, "") not in {"", *known}:
                raise TokenizerError(f"{folder}: {role} {named[role]!r} is not in {TOKENIZER_FILE}")
        self._tokenizer.add_special_tokens({role: token for role, token in named.items() if token in known})
        self._ends = {known[named["eos_token"]]} if "eos_token" in named else set()
        for name in ("generation_config.json", "config.json"):
            ends = (read_json(folder / name) or {}).get("eos_token_id")
            self._ends.update(ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else [])
        special = {text for text, token in added.items() if token.get("special") or re.fullmatch(r"<[|｜].*[|｜]>", text)}
        special.update(token for token in named.values() if token in known)
        self._special = None if allow_special or not special else re.compile("|".join(map(re.escape, sorted(special))))
        self._checked: set[tuple[Any, ...]] = set()  # circumstances in which a key is known to be rendered

    def samples(self, conversation: Conversation) -> list[Sample]:
        """(token ids, which are learnt) of the conversation: one sample, or one per answer, see the module.

        Raises:
            BadConversation: it cannot be rendered, or not all of it is.
        """
        self._check(conversation)
        messages = list(conversation.messages)
        answers = [number for number, item in enumerate(messages) if item["role"] == "assistant"]
        whole, spans = self._render(conversation, messages)
        beginnings = [self._render(conversation, messages[: number + 1]) for number in answers]
        if all(whole.startswith(text) for text, _ in beginnings):
            texts = [whole]
            found = self._answers(conversation, answers, beginnings, spans)
            samples = [self._sample(whole, found)]
        else:
            texts = [text for text, _ in beginnings]
            samples = []
            for index, number in enumerate(answers):
                if weight_of(messages[number]):
                    span = self._answers(conversation, [number], [beginnings[index]], beginnings[index][1])
                    samples.append(self._sample(texts[index], span))
        self._check_kept(conversation, texts, answers)
        return [sample for sample in samples if any(sample[1])]

    def _answers(
        self,
        conversation: Conversation,
        answers: Sequence[int],
        beginnings: Sequence[tuple[str, list[Span]]],
        spans: list[Span],
    ) -> list[Span]:
        """Where the answers of weight 1 are in the text, which begins with each of `beginnings`."""
        messages, found = list(conversation.messages), []
        for number, (text, _) in zip(answers, beginnings, strict=True):
            if not weight_of(messages[number]):
                continue
            before, _ = self._render(conversation, messages[:number]) if number else ("", [])
            if self._marks_answers:
                start = len(before) if text.startswith(before) else len(_common(before, text))
                found += [span for span in spans if start <= span[0] and span[1] <= len(text)]
                continue
            prompt, _ = self._render(conversation, messages[:number], prompt=True) if number else ("", [])
            if not text.startswith(prompt) or not number:
                asked = prompt[len(_common(prompt, text)) :]
                raise BadConversation(
                    f"message {number + 1}: the chat template renders the answer otherwise than it asks for it (the prompt "
                    f"goes on with {asked!r}): use a template with {{% generation %}}, or --template-arguments"
                )
            found.append((len(prompt), len(text)))
        return found

    @property
    def _marks_answers(self) -> bool:
        texts = self.template.values() if isinstance(self.template, dict) else [self.template or ""]
        return any(_GENERATION.search(text) for text in texts)

    def _sample(self, text: str, spans: Sequence[Span]) -> Sample:
        """Tokens as transformers' `apply_chat_template`; a token that reaches into a span is learnt, up to the span's last
        end token (templates write a line break after it, which the model need not say)."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, learnt = list(encoded["input_ids"]), [False] * len(encoded["input_ids"])
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
            ends = [i for i in inside if ids[i] in self._ends]
            for i in inside:
                learnt[i] = self._marks_answers or not ends or i <= ends[-1]
        return ids, learnt

    def _render(
        self, conversation: Conversation, messages: Sequence[Message], prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the spans that the template marks as the assistant's."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{key: item for key, item in part.items() if key != "weight"} for part in messages]
        tools = None if conversation.tools is None else list(conversation.tools)
        arguments = dict(conversation.template_arguments)
        try:
            try:
                text = self._apply(given, tools, prompt, arguments)
            except (jinja2.UndefinedError, TypeError):
                # transformers leaves null values out; older templates ask whether an answer's content is none, and some
                # join arguments as text.
                given = _as_older_templates_have_it(given)
                text = self._plain(given, tools, prompt, arguments)
            spans: list[Span] = []
            if self._marks_answers and not prompt:
                template = self._tokenizer.get_chat_template(tools=tools)
                variables = {**self._tokenizer.special_tokens_map, **arguments}
                _, (spans,) = render_jinja_template(
                    [given], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **variables
                )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadConversation(f"the chat template refuses it: {error}") from error
        return text, [tuple(span) for span in spans]

    def _apply(self, messages: list[Message], tools: Any, prompt: bool, arguments: dict[str, Any]) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **arguments
        )

    def _plain(self, messages: list[Message], tools: Any, prompt: bool, arguments: dict[str, Any]) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(tools=tools)
        variables = {**self._tokenizer.special_tokens_map, **arguments}
        (text,), _ = render_jinja_template(
            [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **variables
        )
        return text

    def _check(self, conversation: Conversation) -> None:
        messages = conversation.messages
        if not messages:
            raise BadConversation("no messages")
        roles = [item["role"] for item in messages]
        if roles[-1] != "assistant":
            raise BadConversation(f"roles {', '.join(roles)}: the last message must be the assistant's")
        if not any(weight_of(item) for item in messages if item["role"] == "assistant"):
            raise BadConversation("every answer has weight 0: there is nothing to learn")
        for number, item in enumerate(messages, 1):
            content = item.get("content")
            other = item["role"] == "assistant" and (item.get("tool_calls") or any(item.get(key) for key in REASONING))
            if content is None and not other:
                raise BadConversation(f"message {number}, of the {item['role']}, has no text under 'content'")
            for text in (content, *(item.get(key) for key in REASONING)):
                match = self._special.search(text) if self._special and text else None
                if match:
                    raise BadConversation(
                        f"message {number}, of the {item['role']}, holds the special token {match[0]!r}, which would be one "
                        "and not text: --allow-special-tokens if it is meant"
                    )

    def _check_kept(self, conversation: Conversation, texts: Sequence[str], answers: Sequence[int]) -> None:
        """Everything that the conversation says is in one of the texts."""
        messages = list(conversation.messages)
        for number, item in enumerate(messages):
            for key in ("content", *REASONING):
                text = item.get(key)
                if text and not any(text.strip() in rendered for rendered in texts):
                    self._check_ends(conversation, number, key)
            for key in item.keys() - set(_LINKS) - set(REASONING):
                self._check_key(conversation, number, key)
        if conversation.tools:
            self._check_removal(conversation, ("tools",), messages, Conversation(messages, None, conversation.template_arguments), "tools")
        for key in conversation.template_arguments:
            named = self.template.values() if isinstance(self.template, dict) else [self.template or ""]
            if not any(re.search(rf"\b{re.escape(key)}\b", text) for text in named):
                raise BadConversation(f"chat_template_kwargs: the chat template does not look at {key!r}")

    def _check_ends(self, conversation: Conversation, number: int, key: str) -> None:
        """A text that is not rendered as it is (escaped, say) is whole if what stands before and after it would be."""
        for place in ("first", "last"):
            messages = deepcopy(list(conversation.messages))
            text = messages[number][key]
            messages[number][key] = _MARK + text if place == "first" else text + _MARK
            rendered, _ = self._render(conversation, messages[: max(number + 1, self._next_answer(messages, number) + 1)])
            if _MARK not in rendered:
                raise BadConversation(
                    f"message {number + 1}: the chat template leaves out a part of {key!r} of the {messages[number]['role']}"
                )

    @staticmethod
    def _next_answer(messages: Sequence[Message], number: int) -> int:
        following = [i for i, item in enumerate(messages) if i >= number and item["role"] == "assistant"]
        return following[0] if following else len(messages) - 1

    def _check_key(self, conversation: Conversation, number: int, key: str) -> None:
        messages = list(conversation.messages)
        item = messages[number]
        if item[key] in (False, 0, "", [], {}):
            return
        near = tuple((part["role"], tuple(sorted(part))) for part in messages[max(0, number - 1) : number + 2])
        circumstances = (key, near, number == len(messages) - 1, len(item[key]) if key == "tool_calls" else 0)
        changed = deepcopy(messages)
        if key == "tool_calls":
            for index, call in enumerate(item[key]):
                self._check_call(conversation, number, index, call, circumstances)
            return
        del changed[number][key]
        self._check_removal(conversation, circumstances, messages, Conversation(changed, conversation.tools, conversation.template_arguments), key, number)

    def _check_call(
        self, conversation: Conversation, number: int, index: int, call: dict[str, Any], circumstances: tuple[Any, ...]
    ) -> None:
        """A call's name and its arguments are each rendered."""
        for part, other in (("name", _MARK), ("arguments", {_MARK: 1})):
            changed = deepcopy(list(conversation.messages))
            before = call["function"][part]
            if before in ({}, "{}", ""):
                continue
            changed[number]["tool_calls"][index]["function"][part] = (
                json.dumps(other) if isinstance(before, str) and part == "arguments" else other
            )
            without = Conversation(changed, conversation.tools, conversation.template_arguments)
            self._check_removal(
                conversation, (*circumstances, index, part), list(conversation.messages), without, "tool_calls", number
            )

    def _check_removal(
        self,
        conversation: Conversation,
        circumstances: tuple[Any, ...],
        messages: Sequence[Message],
        without: Conversation,
        key: str,
        number: int | None = None,
    ) -> None:
        """Raise unless the rendering is another without the key; asked once for the same circumstances."""
        if circumstances in self._checked:
            return
        end = len(messages) if number is None else self._next_answer(messages, number) + 1
        with_key, _ = self._render(conversation, messages[:end])
        try:
            without_key, _ = self._render(without, without.messages[:end])
        except BadConversation:  # the template cannot do without: it looks at it
            without_key = ""
        if with_key == without_key:
            where = "" if number is None else f"message {number + 1}, of the {messages[number]['role']}: "
            raise BadConversation(
                f"{where}the chat template leaves out {key!r}: --ignore-key {key} if that is meant, or another --chat-template"
            )
        self._checked.add(circumstances)


def _common(a: str, b: str) -> str:
    """The longest text that both begin with."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _as_older_templates_have_it(messages: Sequence[Message]) -> list[Message]:
    """`content` is there and null where there is none, and the arguments of a call are JSON text."""
    found = []
    for item in messages:
        item = {"content": None, **deepcopy(item)}
        for call in item.get("tool_calls") or []:
            if not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        found.append(item)
    return found
