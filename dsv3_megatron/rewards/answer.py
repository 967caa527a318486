"""Whether the final answer is right."""

from typing import Any

from dsv3_megatron.rewards.extract import boxed_contents, final_answer, without_thoughts
from dsv3_megatron.rewards.symbolic import equal

__all__ = ["answer", "boxed"]


def answer(prompt: str, response: str, answer: Any) -> float:
    """1.0 where the response's final answer (`extract.final_answer`) equals the given one, else 0.0.

    Args:
        answer: the solution as a text or a number; a list of these: any of them is right. A text with `\\boxed{}` or
            `<answer>` stands for what is inside it.

    Raises:
        ValueError: the answer is none of these, or empty: a fault of the data, not of the response.
    """
    return _judged(final_answer(response), answer)


def boxed(prompt: str, response: str, answer: Any) -> float:
    """As `answer`, where only the last `\\boxed{}` after the thoughts counts."""
    return _judged(next(reversed(boxed_contents(without_thoughts(response))), None), answer)


def _judged(found: str | None, answer: Any) -> float:
    right = [_text(one) for one in (answer if isinstance(answer, list) else [answer])]
    if not right:
        raise ValueError("the answer is an empty list: give the solution")
    return float(found is not None and any(equal(found, one) for one in right))


def _text(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the answer must be a text or a number, not {type(answer).__name__}")
    text = str(answer)
    inside = final_answer(text) if "boxed" in text or "<answer>" in text or "####" in text else text
    if not (inside and inside.strip()):
        raise ValueError("the answer is empty: give the solution")
    return inside
