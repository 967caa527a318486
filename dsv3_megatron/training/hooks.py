"""What is called around each of Megatron's training steps (patch `train_step`).

    hooks.before_step(f)    f(call): before the step; `call` holds train_step's arguments by name
    hooks.before_update(f)  f(call): gradients are there, the optimizer has not changed the weights yet
    hooks.after_step(f)     f(call, result): weights are updated; `result` is train_step's

A function may be added once; they are called in the order in which they were added, on every rank.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["after_step", "before_step", "before_update", "run_step"]

_before: list[Callable[[dict[str, Any]], None]] = []
_update: list[Callable[[dict[str, Any]], None]] = []
_after: list[Callable[[dict[str, Any], Any], None]] = []


def before_step(function: Callable[[dict[str, Any]], None]) -> None:
    """Call `function(call)` before each training step."""
    _add(_before, function)


def before_update(function: Callable[[dict[str, Any]], None]) -> None:
    """Call `function(call)` between forward-backward and the optimizer's step."""
    _add(_update, function)


def after_step(function: Callable[[dict[str, Any], Any], None]) -> None:
    """Call `function(call, result)` after each training step."""
    _add(_after, function)


def _add(functions: list[Any], function: Any) -> None:
    from dsv3_megatron.patching import install

    install(["train_step"])
    if function not in functions:
        functions.append(function)


def run_step(original: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Called by the patch in place of `train_step`, with its arguments by name."""
    for before in _before:
        before(call)
    forward_backward = call["forward_backward_func"]

    def then_update(*args: Any, **kwargs: Any) -> Any:
        losses = forward_backward(*args, **kwargs)
        for update in _update:
            update(call)
        return losses

    result = original(**{**call, "forward_backward_func": then_update})
    for after in _after:
        after(call, result)
    return result
