"""Whether a response has the form that was asked for."""

import re
from typing import Any

from dsv3_megatron.rewards.extract import boxed_contents, without_thoughts

__all__ = ["boxed_once", "regular", "think_answer"]

_R1 = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_answer(prompt: str, response: str, answer: Any = None) -> float:
    """R1-Zero's format (R1 §2.2.2): `<think>…</think> <answer>…</answer>`, each tag once, neither empty, nothing
    around.

    Where the prompt's text already ends with `<think>` (the template opened it), the response goes on after it.
    """
    text = ("<think>" if prompt.rstrip().endswith("<think>") and "<think>" not in response else "") + response
    match = _R1.fullmatch(text)
    once = all(text.count(tag) == 1 for tag in _TAGS)
    return float(bool(match and once and match[1].strip() and match[2].strip()))


def boxed_once(prompt: str, response: str, answer: Any = None) -> float:
    """1.0 where exactly one non-empty `\\boxed{}` stands after the thoughts."""
    found = boxed_contents(without_thoughts(response))
    return float(len(found) == 1 and bool(found[0]))


def regular(prompt: str, response: str, answer: Any) -> float:
    """1.0 where the whole response, without white space around it, matches the regular expression `answer`.

    Raises:
        ValueError: the expression is none.
    """
    if not isinstance(answer, str):
        raise ValueError(f"the answer must be a regular expression, not {type(answer).__name__}")
    try:
        expression = re.compile(answer, re.DOTALL)
    except re.error as error:
        raise ValueError(f"the answer is no regular expression: {error}") from error
    return float(expression.fullmatch(response.strip()) is not None)
