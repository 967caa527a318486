"""Answers in OpenAI's form, whole or in pieces. Pure logic."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.inference.server.requests import Request
from dsv3_megatron.inference.text import TextStream

__all__ = ["Choice", "Form", "error_body"]

TopLogprobs = dict[str, float]  # token id as text → log-probability, as the engines send them


class Choice:
    """One answer as it grows: tokens in, text and log-probabilities out.

    Args:
        index: among the answers to a body.
        prompt: its prompt's ids.
        decode: ids to text; None without a tokenizer (then the text is empty).
        token_text: one id to its text, special tokens written out.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        request: Request,
        ends: Sequence[int],
        decode: Callable[[list[int]], str] | None,
        token_text: Callable[[int], str],
    ):
        self.index, self.prompt = index, prompt
        self._request, self._ends, self._decode = request, ends, decode
        self._token_text = token_text
        self._stream = TextStream(decode or (lambda ids: ""), request.stop)
        self.num_tokens = 0
        self.offset = 0  # in the texts of its tokens, of the next one that is named
        self.finish_reason: str | None = None
        self._ended = False

    def push(self, tokens: Sequence[int], log_probs: Sequence[float], top: Sequence[TopLogprobs]) -> "Piece":
        """New tokens; what to show of them."""
        piece = Piece()
        for place, token in enumerate(tokens):
            self.num_tokens += 1
            self._ended |= token in self._ends and not self._request.ignore_eos
            if self._stream.stopped:
                continue
            piece.text += self._stream.push([token])
            if not self._stream.stopped and place < len(log_probs):
                piece.add(token, log_probs[place], top[place] if place < len(top) else {})
        return piece

    def finish(self) -> "Piece":
        """The rest, at the end; sets `finish_reason`."""
        piece = Piece(self._stream.finish())
        stopped = self._ended or self._stream.stopped
        self.finish_reason = "stop" if stopped else "length"
        return piece

    def echoed(self, log_probs: Sequence[float], top: Sequence[TopLogprobs]) -> "Piece":
        """The prompt as the beginning of the answer; its first token has no probability."""
        piece = Piece("" if self._decode is None else self._decode(self.prompt))
        if self._request.top_logprobs is not None:
            piece.add(self.prompt[0], None, None)
            for place, token in enumerate(self.prompt[1:]):
                value = log_probs[place] if place < len(log_probs) else None
                piece.add(token, value, top[place] if place < len(top) else {})
        return piece

    def token_text(self, token: int) -> str:
        """Text of a token, as log-probabilities name it."""
        return self._token_text(token)


@dataclass
class Piece:
    """Some text of an answer and its tokens' log-probabilities."""

    text: str = ""

    def __post_init__(self) -> None:
        self.tokens: list[tuple[int, float | None, TopLogprobs | None]] = []

    def add(self, token: int, log_prob: float | None, top: TopLogprobs | None) -> None:
        """A token's log-probability, and those of its alternatives."""
        self.tokens.append((token, log_prob, top))

    def __add__(self, other: "Piece") -> "Piece":
        both = Piece(self.text + other.text)
        both.tokens = self.tokens + other.tokens
        return both


class Form:
    """How answers to one body look.

    Args:
        chat: of `/v1/chat/completions`, else of `/v1/completions`.
        model: its name.
    """

    def __init__(self, chat: bool, model: str, request: Request):
        self._chat, self._request = chat, request
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind = kind

    def whole(self, choices: Sequence[tuple[Choice, Piece]]) -> dict[str, Any]:
        """The complete answer."""
        return {
            **self._head,
            "object": self._kind,
            "choices": [self._choice(choice, piece, "message") for choice, piece in choices],
            "usage": self.usage([choice for choice, _ in choices]),
        }

    def piece(self, choice: Choice, piece: Piece, first: bool = False) -> dict[str, Any]:
        """An event of a stream."""
        body = self._choice(choice, piece, "delta")
        if self._chat and first:
            body["delta"] = {"role": "assistant", **body["delta"]}
        return {**self._head, "object": self._kind + (".chunk" if self._chat else ""), "choices": [body]}

    def usage_event(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last event of a stream that was asked for usage."""
        kind = self._kind + (".chunk" if self._chat else "")
        return {**self._head, "object": kind, "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Tokens of the prompts and of the answers."""
        prompt = sum(map(len, self._request.prompts))
        completion = sum(choice.num_tokens for choice in choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _choice(self, choice: Choice, piece: Piece, key: str) -> dict[str, Any]:
        wanted = self._request.top_logprobs is not None
        if not self._chat:
            logprobs = self._completion_logprobs(choice, piece) if wanted else None
            return {
                "index": choice.index, "text": piece.text, "logprobs": logprobs, "finish_reason": choice.finish_reason,
            }  # fmt: skip
        content: dict[str, Any] = {"content": piece.text}
        if key == "message":
            content = {"role": "assistant", **content}
        logprobs = (
            {"content": [self._chat_logprob(choice, *token) for token in piece.tokens]} if wanted else None
        )
        return {
            "index": choice.index,
            key: content,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    @staticmethod
    def _completion_logprobs(choice: Choice, piece: Piece) -> dict[str, Any]:
        tokens = [choice.token_text(token) for token, _, _ in piece.tokens]
        offsets = [choice.offset]
        for text in tokens:
            offsets.append(offsets[-1] + len(text))
        choice.offset = offsets[-1]
        return {
            "tokens": tokens,
            "token_logprobs": [log_prob for _, log_prob, _ in piece.tokens],
            "top_logprobs": [None if top is None else _by_text(choice, top) for _, _, top in piece.tokens],
            "text_offset": offsets[:-1],
        }

    @staticmethod
    def _chat_logprob(
        choice: Choice, token: int, log_prob: float | None, top: TopLogprobs | None
    ) -> dict[str, Any]:
        def entry(token: int, value: float | None) -> dict[str, Any]:
            text = choice.token_text(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            **entry(token, log_prob),
            "top_logprobs": [entry(int(i), value) for i, value in (top or {}).items()],
        }


def error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """The body of a refusal or a failure."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _by_text(choice: Choice, top: TopLogprobs) -> TopLogprobs:
    """Text of each token → log-probability, the larger one of tokens with the same text (parts of characters)."""
    found: TopLogprobs = {}
    for token, value in top.items():
        text = choice.token_text(int(token))
        found[text] = max(value, found.get(text, value))
    return found
