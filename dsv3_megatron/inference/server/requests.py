"""Bodies of OpenAI's `/v1/completions` and `/v1/chat/completions`, checked. Pure logic."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BadRequest", "Limits", "Request", "chat_request", "completion_request"]

# Of the API, without influence on the answer here.
_IGNORED = {"user", "metadata", "store", "service_tier"}
# Of the API, and not done here: only the value that changes nothing is accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
}
_COMMON = {
    "model",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "ignore_eos",
}
_OF_COMPLETIONS = {"prompt", "max_tokens", "logprobs", "echo", "best_of"}
_OF_CHAT = {"messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"}
MOST_LOGPROBS = 20
MOST_CHOICES = 128
DEFAULT_MAX_TOKENS = 16  # OpenAI's for completions


class BadRequest(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status, 4xx.
        param: the key that is wrong, None where it is none in particular.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Limits:
    """What the served model can do.

    Attributes:
        model: its name.
        max_length: tokens of prompt and answer.
        vocab_size: of token ids.
    """

    model: str
    max_length: int
    vocab_size: int


@dataclass(frozen=True)
class Request:
    """A checked body.

    Attributes:
        prompts: token ids of each prompt.
        n: choices per prompt.
        top_logprobs: alternatives per token; None for no log-probabilities at all.
        echo: the prompt is part of the answer.
        include_usage: a stream ends with the number of tokens.
    """

    prompts: list[list[int]]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    n: int
    stop: tuple[str, ...]
    seed: int
    ignore_eos: bool
    top_logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool


def completion_request(body: Any, limits: Limits, encode: Callable[[str], list[int]] | None) -> Request:
    """Check the body of `/v1/completions`.

    Args:
        encode: text to ids; None where the model has no tokenizer, and prompts must be ids.

    Raises:
        BadRequest: with the reason.
    """
    body = _checked_keys(body, limits, _COMMON | _OF_COMPLETIONS)
    max_tokens = _whole(body, "max_tokens", DEFAULT_MAX_TOKENS, least=0)
    if body.get("best_of") not in (None, _whole(body, "n", 1, least=1)):
        raise BadRequest("best_of other than n is not done: leave it out", "best_of")
    logprobs = body.get("logprobs")
    top = None if logprobs is None or logprobs is False else _whole(body, "logprobs", 0, 0, MOST_LOGPROBS)
    prompts = _prompts(body, limits, encode)
    echo = _flag(body, "echo")
    if echo and top is not None and _flag(body, "stream"):
        raise BadRequest("echo with logprobs is not streamed: leave stream out", "stream")
    if not max_tokens and not echo:
        raise BadRequest("max_tokens must be 1 or more, or echo true", "max_tokens")
    for prompt in prompts:
        _check_length(len(prompt), max_tokens, limits)
    return _request(body, prompts, max_tokens, top, echo)


def chat_request(body: Any, limits: Limits, chat: Callable[[Any], list[int]] | None) -> Request:
    """Check the body of `/v1/chat/completions`.

    Args:
        chat: messages to ids; raises ValueError where they are not as they should be. None without a tokenizer.

    Raises:
        BadRequest: with the reason.
    """
    body = _checked_keys(body, limits, _COMMON | _OF_CHAT)
    if chat is None:
        raise BadRequest("the model has no tokenizer: use /v1/completions with token ids", status=404)
    if not isinstance(body.get("messages"), list):
        raise BadRequest("messages must be a list of objects with role and content", "messages")
    try:
        prompt = chat(_with_plain_text(body["messages"]))
    except ValueError as error:
        raise BadRequest(str(error), "messages") from error
    rest = limits.max_length - len(prompt)
    if rest < 1:
        _check_length(len(prompt), 1, limits)
    names = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    max_tokens = _whole(body, names[0], 0, least=1) if names else rest
    _check_length(len(prompt), max_tokens, limits)
    top = _whole(body, "top_logprobs", 0, 0, MOST_LOGPROBS) if _flag(body, "logprobs") else None
    if top is None and body.get("top_logprobs"):
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    return _request(body, [prompt], max_tokens, top, echo=False)


def _request(
    body: Mapping[str, Any], prompts: list[list[int]], max_tokens: int, top: int | None, echo: bool
) -> Request:
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    return Request(
        prompts=prompts,
        max_tokens=max_tokens,
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 0, 1, exclusive=True),
        top_k=_whole(body, "top_k", 0, least=0),
        n=_whole(body, "n", 1, 1, MOST_CHOICES),
        stop=_stop(body),
        seed=secrets.randbits(62) if body.get("seed") is None else _whole(body, "seed", 0),
        ignore_eos=_flag(body, "ignore_eos"),
        top_logprobs=top,
        echo=echo,
        stream=_flag(body, "stream"),
        include_usage=bool(options.get("include_usage")),
    )


def _checked_keys(body: Any, limits: Limits, known: set[str]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for key, value in body.items():
        if key in _NEUTRAL and not any(value == neutral for neutral in _NEUTRAL[key]):
            raise BadRequest(f"{key}={value!r} is not done here: leave it out", key)
        if key not in known | _IGNORED | _NEUTRAL.keys():
            raise BadRequest(f"unknown parameter {key!r}", key)
    if body.get("model") not in (None, limits.model):
        raise BadRequest(f"model {body['model']!r} is not served, only {limits.model!r}", "model", status=404)
    return body


def _prompts(
    body: Mapping[str, Any], limits: Limits, encode: Callable[[str], list[int]] | None
) -> list[list[int]]:
    given = body.get("prompt")
    wanted = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists"
    if isinstance(given, str) or (isinstance(given, list) and given and all(type(x) is int for x in given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise BadRequest(wanted, "prompt")
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            if encode is None:
                raise BadRequest("the model has no tokenizer: give the prompt as token ids", "prompt")
            prompt = encode(prompt)
        elif not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise BadRequest(wanted, "prompt")
        if not prompt:
            raise BadRequest("the prompt is empty: give at least one token", "prompt")
        for token in prompt:
            if not 0 <= token < limits.vocab_size:
                raise BadRequest(f"token {token} is not in the vocabulary of {limits.vocab_size}", "prompt")
        prompts.append(prompt)
    return prompts


def _check_length(prompt: int, max_tokens: int, limits: Limits) -> None:
    if prompt + max_tokens > limits.max_length:
        raise BadRequest(
            f"the maximum context length is {limits.max_length} tokens; the prompt has {prompt}, and {max_tokens} "
            "were asked for",
            "max_tokens",
        )


def _with_plain_text(messages: Any) -> Any:
    """Content given as a list of parts, joined where all are text."""
    if not isinstance(messages, list):
        return messages
    plain = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(
            isinstance(p, dict) and p.get("type") == "text" for p in content
        ):
            message = {**message, "content": "".join(str(part.get("text", "")) for part in content)}
        plain.append(message)
    return plain


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    given = body.get("stop")
    stop = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest("stop must be a text or a list of texts, none empty", "stop")
    return tuple(stop)


def _number(
    body: Mapping[str, Any], key: str, default: float, least: float, most: float, exclusive: bool = False
) -> float:
    value = body.get(key)
    if value is None:
        return default
    in_range = type(value) in (int, float) and least <= value <= most and not (exclusive and value == least)
    if not in_range:
        raise BadRequest(
            f"{key}={value!r}: must be a number {'above' if exclusive else 'from'} {least} to {most}", key
        )
    return float(value)


def _whole(
    body: Mapping[str, Any], key: str, default: int, least: int | None = None, most: int | None = None
) -> int:
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not int or (least is not None and value < least) or (most is not None and value > most):
        limits = [
            f"{word} {limit}" for word, limit in (("at least", least), ("at most", most)) if limit is not None
        ]
        raise BadRequest(
            f"{key}={value!r}: must be a whole number{', ' if limits else ''}{', '.join(limits)}", key
        )
    return value


def _flag(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):  # 1 is no true
        raise BadRequest(f"{key}={value!r}: must be true or false", key)
    return bool(value)
