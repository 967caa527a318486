"""Conversations to samples: by the tokenizer's own chat template or by ours, in one process or in several."""

import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.tokenizer_files import chat_template
from dsv3_megatron.data.vocabulary import ASSISTANT, BOS, CHAT_TEMPLATE, USER, DocumentEncoder
from dsv3_megatron.sft.chat import check, conversation_tokens
from dsv3_megatron.sft.conversation import BadConversation, Conversation
from dsv3_megatron.sft.template import JinjaTemplate, Sample

__all__ = ["OURS", "Ours", "Rendering", "Rows", "rendered"]

OURS = "dsv3"  # --chat-template
_CHUNK = 256  # conversations of one piece of work

# Token ids int32 and what is learnt, bool, of a sample.
Rows = tuple[np.ndarray, np.ndarray]


class Ours:
    """Our template (`chat.py`) with a tokenizer. TokenizerError where it lacks the special tokens for it."""

    def __init__(self, tokenizer: Path) -> None:
        self._encoder = DocumentEncoder(tokenizer)
        self._encoder.require((BOS, USER, ASSISTANT), f"--chat-template {OURS}")
        self.notes: Counter[str] = Counter()

    def samples(self, conversation: Conversation) -> list[Sample]:
        check(conversation.messages)
        if conversation.template_arguments:
            raise BadConversation("key 'chat_template_kwargs': our template has no variables")
        encoder, tools = self._encoder, conversation.tools
        return [conversation_tokens(conversation.messages, encoder.encode, encoder.special_ids, tools)]

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the next answer begins; `samples` of the conversation with it begin so."""
        answered = conversation.answered()
        ((ids, _),) = self.samples(answered)
        backwards = ids[::-1].index(self._encoder.special_ids[ASSISTANT])
        return ids[: len(ids) - backwards]


@dataclass(frozen=True)
class Rendering:
    """Which template, and how.

    Attributes:
        template: "dsv3" for ours, a file of jinja, or None: the tokenizer's own, or ours where it has none.
        arguments: variables of a jinja template.
        allow_special: special tokens in messages are special tokens.
    """

    tokenizer: Path
    template: str | None = None
    arguments: Mapping[str, Any] | None = None
    allow_special: bool = False

    @property
    def name(self) -> str:
        """Of the template, for people."""
        return "of the tokenizer" if self._is_jinja and self.template is None else self.template or OURS

    @property
    def _is_jinja(self) -> bool:
        if self.template is None:
            return chat_template(self.tokenizer) not in (None, CHAT_TEMPLATE)
        return self.template != OURS

    def build(self) -> Ours | JinjaTemplate:
        """What makes samples.

        Raises:
            TokenizerError, BadConversation: tokenizer, template and options do not fit together.
        """
        if self._is_jinja:
            text = None if self.template is None else _read(self.template)
            DocumentEncoder(self.tokenizer)  # which says what is wrong with a folder
            return JinjaTemplate(self.tokenizer, text, self.arguments, self.allow_special)
        if self.arguments or self.allow_special:
            raise BadConversation(
                "--template-arguments and --allow-special-tokens are for a jinja template, and this is ours: name one "
                "with --chat-template FILE"
            )
        return Ours(self.tokenizer)


def _read(template: str) -> str:
    try:
        return Path(template).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadConversation(f"--chat-template {template}: not UTF-8: convert it first (iconv)") from None


def rendered(
    conversations: Sequence[Conversation], rendering: Rendering, workers: int, notes: Counter[str], label: str
) -> Iterator[Rows]:
    """The samples of all conversations in their order; `notes` grows. BadConversation begins with `file:line`."""
    chunks = [conversations[start : start + _CHUNK] for start in range(0, len(conversations), _CHUNK)]
    progress = _Progress(label, len(conversations))
    if workers == 1 or len(chunks) <= 1:
        template = rendering.build()
        for chunk in chunks:
            yield from _samples(template, chunk)
            progress.add(len(chunk))
        notes.update(template.notes)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # the tokenizers library has threads, which do not survive a fork
    with ProcessPoolExecutor(min(workers, len(chunks)), context, _start, (rendering,)) as pool:
        try:
            for chunk, (samples, noted) in zip(chunks, pool.map(_work, chunks), strict=True):
                yield from samples
                notes.update(noted)
                progress.add(len(chunk))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_template: Ours | JinjaTemplate | None = None  # of a worker process


def _start(rendering: Rendering) -> None:
    global _template
    _template = rendering.build()


def _work(chunk: Sequence[Conversation]) -> tuple[list[Rows], Counter[str]]:
    assert _template is not None
    samples = list(_samples(_template, chunk))
    notes, _template.notes = _template.notes, Counter()
    return samples, notes


def _samples(template: Ours | JinjaTemplate, chunk: Sequence[Conversation]) -> Iterator[Rows]:
    for item in chunk:
        try:
            samples = template.samples(item)
        except BadConversation as error:
            raise BadConversation(f"{item.where}: {error}" if item.where else str(error)) from None
        for ids, learnt in samples:
            yield np.asarray(ids, np.int32), np.asarray(learnt, bool)


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self, label: str, total: int, interval: float = 5.0) -> None:
        self.label, self.total, self.interval = label, total, interval
        self.done, self.start = 0, time.monotonic()
        self.last = self.start

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.interval:
            self.last = now
            left = (self.total - self.done) * (now - self.start) / self.done
            text = f"[sft] {self.label}: {self.done}/{self.total} conversations, ETA {left:.0f} s"
            print(text, file=sys.stderr, flush=True)
