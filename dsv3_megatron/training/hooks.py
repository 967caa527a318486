"""Where features take hold of a run without knowing each other: lists of functions, called by the trainer.

    hooks.after_validation(f)  f(args): Megatron has validated its arguments, nothing is built (patch `validate_args`)
    hooks.while_loading(f)     f(call): a context around the loading of a checkpoint; it may change `call`
    hooks.after_load(f)        f(call, iteration): a checkpoint is loaded; `call` holds load_checkpoint's arguments
    hooks.before_step(f)       f(call): before a step; `call` holds train_step's arguments by name (patch `train_step`)
    hooks.on_output(f)         f(model, output): a chunk has finished a forward pass, in the order of its microbatches
    hooks.on_loss(f)           f(total, num_tokens): the last stage has a loss (sum over tokens); before its `on_output`
    hooks.before_update(f)     f(call): gradients are there, the optimizer has not changed the weights yet
    hooks.after_step(f)        f(call, result): weights are updated; `result` is train_step's

A function may be added once; they are called in the order in which they were added, on every rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor

from dsv3_megatron.patching import install

__all__ = [
    "after_load",
    "after_step",
    "after_validation",
    "before_step",
    "before_update",
    "loaded",
    "loading",
    "on_loss",
    "on_output",
    "run_step",
    "saw_loss",
    "saw_output",
    "validated",
    "while_loading",
]

_validated: list[Callable[[Any], None]] = []
_loading: list[Callable[[dict[str, Any]], AbstractContextManager[Any]]] = []
_loaded: list[Callable[[dict[str, Any], int], None]] = []
_before: list[Callable[[dict[str, Any]], None]] = []
_output: list[Callable[[Any, Tensor], None]] = []
_loss: list[Callable[[Tensor, Tensor], None]] = []
_update: list[Callable[[dict[str, Any]], None]] = []
_after: list[Callable[[dict[str, Any], Any], None]] = []


def after_validation(function: Callable[[Any], None]) -> None:
    """Call `function(args)` once Megatron has validated its arguments, before anything is configured from them."""
    _add(_validated, function, "validate_args")


def while_loading(function: Callable[[dict[str, Any]], AbstractContextManager[Any]]) -> None:
    """Load the checkpoint that the run begins with inside `function(call)`."""
    _add(_loading, function, "load_checkpoint")


def after_load(function: Callable[[dict[str, Any], int], None]) -> None:
    """Call `function(call, iteration)` once the checkpoint that the run begins with is loaded; 0: it begins anew."""
    _add(_loaded, function, "load_checkpoint")


def before_step(function: Callable[[dict[str, Any]], None]) -> None:
    """Call `function(call)` before each training step."""
    _add(_before, function, "train_step")


def on_output(function: Callable[[Any, Tensor], None]) -> None:
    """Call `function(model, output)` after each forward pass of a chunk, in training and in evaluation."""
    _add(_output, function)


def on_loss(function: Callable[[Tensor, Tensor], None]) -> None:
    """Call `function(total, num_tokens)` for each loss, right before the `on_output` of its pass."""
    _add(_loss, function)


def before_update(function: Callable[[dict[str, Any]], None]) -> None:
    """Call `function(call)` between forward-backward and the optimizer's step."""
    _add(_update, function, "train_step")


def after_step(function: Callable[[dict[str, Any], Any], None]) -> None:
    """Call `function(call, result)` after each training step."""
    _add(_after, function, "train_step")


def _add(functions: list[Any], function: Any, *patches: str) -> None:
    install(patches)
    if function not in functions:
        functions.append(function)


def validated(args: Any) -> None:
    """Told by the patch `validate_args`."""
    for function in _validated:
        function(args)


def loading(call: dict[str, Any]) -> ExitStack:
    """The contexts in which the patch `load_checkpoint` loads."""
    contexts = ExitStack()
    for function in _loading:
        contexts.enter_context(function(call))
    return contexts


def loaded(call: dict[str, Any], iteration: int) -> None:
    """Told by the patch `load_checkpoint`."""
    for function in _loaded:
        function(call, iteration)


def saw_output(model: Any, output: Tensor) -> None:
    """Told by whoever runs a chunk forward: the trainer's forward step, or the schedule that runs its plan."""
    for function in _output:
        function(model, output)


def saw_loss(total: Tensor, num_tokens: Tensor) -> None:
    """Told by the loss function."""
    for function in _loss:
        function(total, num_tokens)


def run_step(original: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Called by the patch `train_step` in place of Megatron's, with its arguments by name."""
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
