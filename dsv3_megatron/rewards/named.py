"""From a name to a reward: shipped ones, "module:function", and weighted sums of these."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from dsv3_megatron.errors import RefusedArgument

__all__ = ["SHIPPED", "Part", "Reward", "Weighted", "names", "parts_of", "resolve"]


class Reward(Protocol):
    """`reward(prompt, response, answer) -> float`.

    Args of a call:
        prompt: the text that the model was given (positional, as are the others).
        response: what it wrote, without the token that ended it.
        answer: what the data gives with the prompt, any JSON value; None where it gives nothing.

    Returns:
        a finite number; 1.0 is right and 0.0 is wrong where nothing else is said.
    """

    def __call__(self, prompt: str, response: str, answer: Any, /) -> float: ...


# name: (module of this package, function, what it looks at)
SHIPPED: dict[str, tuple[str, str, str]] = {
    "answer": (
        "answer",
        "answer",
        "final answer (<answer>, \\boxed{} or the last line) equals the given one",
    ),
    "boxed": ("answer", "boxed", "final answer in \\boxed{…} only equals the given one"),
    "format": ("formats", "think_answer", "<think>…</think> <answer>…</answer>, once, and nothing else"),
    "boxed-format": ("formats", "boxed_once", "exactly one \\boxed{…}, outside the thoughts"),
    "language": (
        "language",
        "language",
        "share of words in the scripts of the prompt (R1's language consistency)",
    ),
    "regular": ("formats", "regular", "the whole response matches the regular expression in `answer`"),
    "code": ("code", "code", "generated Python passes the tests in `answer`, in the sandbox"),
    "gym": ("gym", "gym", "reasoning-gym's own score of a generated task (extra `rewards`)"),
    "smt": ("smt", "smt", "each step of a proof follows from those before it, by z3 (extra `rewards`)"),
    "lean": (
        "lean",
        "lean",
        "Lean accepts the theorem with the response's proof (where `lean` is installed)",
    ),
    "code-fraction": ("code", "code_fraction", "fraction of a list of tests that generated Python passes"),
}


@dataclass(frozen=True)
class Part:
    """A reward and its weight in a sum; `name` resolves to it again in another process."""

    name: str
    weight: float = 1.0


class Weighted:
    """A sum of rewards: Σ weight · reward. A part that is not finite makes the sum so."""

    def __init__(self, parts: tuple[Part, ...]):
        self.parts = parts
        self.rewards = tuple(_one(part.name) for part in parts)

    def __call__(self, prompt: str, response: str, answer: Any) -> float:
        return math.fsum(self.each(prompt, response, answer).values())

    def each(self, prompt: str, response: str, answer: Any) -> dict[str, float]:
        """Weighted value of each part."""
        return {
            part.name: part.weight * float(reward(prompt, response, answer))
            for part, reward in zip(self.parts, self.rewards, strict=True)
        }


def names() -> dict[str, str]:
    """Shipped rewards, each with a line."""
    return {name: line for name, (_, _, line) in SHIPPED.items()}


def parts_of(reward: "str | Reward | Callable[..., float]") -> tuple[Part, ...]:
    """Names and weights of a reward, without importing it.

    Args:
        reward: "name", "module:function", "name=weight,…", or a function of a module.

    Raises:
        RefusedArgument: a name that is none, a weight that is no finite number, a name that stands twice, or a function
            that another process could not import (a lambda, one inside another, one of `__main__`).
    """
    if isinstance(reward, Weighted):
        return reward.parts
    if not isinstance(reward, str):
        return (Part(_path_of(reward)),)
    parts: list[Part] = []
    for piece in reward.split(","):
        name, _, weight = piece.strip().partition("=")
        name = name.strip()
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise RefusedArgument(
                f"reward {reward!r}: the weight {weight!r} of {name!r} is not a finite number"
            )
        if not name or (":" not in name and name not in SHIPPED):
            close = difflib.get_close_matches(name, SHIPPED, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RefusedArgument(
                f"reward {name!r}: no such reward; {hint}give module:function, or one of {', '.join(SHIPPED)}"
            )
        if any(part.name == name for part in parts):
            raise RefusedArgument(f"reward {reward!r}: {name!r} stands twice; give it one weight")
        parts.append(Part(name, value))
    return tuple(parts)


def resolve(reward: "str | Reward | Callable[..., float]") -> "Reward":
    """The reward of a name; a function is returned as it is.

    Raises:
        RefusedArgument: see `parts_of`; or its module cannot be imported, has no such function, or the function
            cannot be called with three arguments; or what a shipped reward needs (a package, the sandbox) is not here.
    """
    if not isinstance(reward, str):
        _check_signature(getattr(reward, "__name__", repr(reward)), reward)
        return reward  # type: ignore[return-value]
    parts = parts_of(reward)
    if len(parts) == 1 and parts[0].weight == 1.0:
        return _one(parts[0].name)
    return Weighted(parts)


def _one(name: str) -> "Reward":
    if name in SHIPPED:
        place, function, _ = SHIPPED[name]
        shipped = importlib.import_module(f"dsv3_megatron.rewards.{place}")
        if check := getattr(shipped, "CHECKS", {}).get(function):
            check()
        return getattr(shipped, function)
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever the user's module does
        raise RefusedArgument(f"reward {name!r}: cannot import {module!r}: {error!r}") from error
    for word in path.split("."):
        if not hasattr(found, word):
            raise RefusedArgument(f"reward {name!r}: {module!r} has no {path!r}")
        found = getattr(found, word)
    _check_signature(name, found)
    return found


def _check_signature(name: str, function: Any) -> None:
    if not callable(function):
        raise RefusedArgument(f"reward {name!r}: is no function of (prompt, response, answer)")
    try:
        inspect.signature(function).bind("prompt", "response", "answer")
    except TypeError:
        raise RefusedArgument(
            f"reward {name!r}: cannot be called as reward(prompt, response, answer): it takes "
            f"{inspect.signature(function)}"
        ) from None
    except ValueError:
        return  # built in, without a signature


def _path_of(function: Any) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    for short, (place, path, _) in SHIPPED.items():
        if (module, name) == (f"dsv3_megatron.rewards.{place}", path):
            return short
    if not module or module == "__main__" or not name or "<" in name:
        raise RefusedArgument(
            f"reward {name or function!r}: another process cannot import it; give a function of a module, or "
            "isolate=False to call it in this process, where it can hang or end the run"
        )
    return f"{module}:{name}"
