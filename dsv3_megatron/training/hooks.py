"""Where features take hold of a run without knowing each other: lists of functions, called by the trainer.

    hooks.after_validation(f)  f(args): Megatron has validated its arguments, nothing is built (patch `validate_args`)
    hooks.before_build(f)      f(config, pg_collection): process groups are there, a chunk of the model is not built yet
    hooks.while_loading(f)     f(call): a context around the loading of a checkpoint; it may change `call`
    hooks.after_load(f)        f(call, iteration): a checkpoint is loaded; `call` holds load_checkpoint's arguments
    hooks.before_step(f)       f(call): before a step; `call` holds train_step's arguments by name (patch `train_step`)
    hooks.around_forward(f)    f(model, batch): a context around a chunk's training forward pass without a plan
    hooks.on_output(f)         f(model, output): a chunk has finished a forward pass, in the order of its microbatches
    hooks.on_loss(f)           f(total, num_tokens): the last stage has a loss (sum over tokens); before its `on_output`
    hooks.before_update(f)     f(call): gradients are there, the optimizer has not changed the weights yet
    hooks.after_step(f)        f(call, result): weights are updated; `result` is train_step's
    hooks.around_checkpoint(f, g)  f(call) before a checkpoint is written, or loaded during a run; g(call) after
    hooks.on_experts_move(f)   f(carry): experts go to other ranks; carry(tensor_of) takes along what a feature keeps

A function may be added once; they are called in the order in which they were added, on every rank.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor

from dsv3_megatron.patching import install

__all__ = [
    "after_load",
    "after_step",
    "after_validation",
    "around_checkpoint",
    "around_forward",
    "before_build",
    "before_step",
    "before_update",
    "building",
    "checkpoint",
    "experts_move",
    "forward",
    "loaded",
    "loading",
    "on_experts_move",
    "on_loss",
    "on_output",
    "run_step",
    "saw_loss",
    "saw_output",
    "validated",
    "while_loading",
]

_validated: list[Callable[[Any], None]] = []
_build: list[Callable[[Any, Any], None]] = []
_loading: list[Callable[[dict[str, Any]], AbstractContextManager[Any]]] = []
_loaded: list[Callable[[dict[str, Any], int], None]] = []
_before: list[Callable[[dict[str, Any]], None]] = []
_forward: list[Callable[[Any, dict[str, Any]], AbstractContextManager[Any]]] = []
_output: list[Callable[[Any, Tensor], None]] = []
_loss: list[Callable[[Tensor, Tensor], None]] = []
_update: list[Callable[[dict[str, Any]], None]] = []
_checkpoint: list[tuple[Callable[[dict[str, Any]], None], Callable[[dict[str, Any]], None]]] = []
_move: list[Callable[[Callable[[Callable[[Tensor], Tensor]], None]], None]] = []
_after: list[Callable[[dict[str, Any], Any], None]] = []


def after_validation(function: Callable[[Any], None]) -> None:
    """Call `function(args)` once Megatron has validated its arguments, before anything is configured from them."""
    _add(_validated, function, "validate_args")


def before_build(function: Callable[[Any, Any], None]) -> None:
    """Call `function(config, pg_collection)` on every rank before each chunk of its model is built."""
    _add(_build, function)


def while_loading(function: Callable[[dict[str, Any]], AbstractContextManager[Any]]) -> None:
    """Load the checkpoint that the run begins with inside `function(call)`."""
    _add(_loading, function, "load_checkpoint")


def after_load(function: Callable[[dict[str, Any], int], None]) -> None:
    """Call `function(call, iteration)` once the checkpoint that the run begins with is loaded; 0: it begins anew."""
    _add(_loaded, function, "load_checkpoint")


def before_step(function: Callable[[dict[str, Any]], None]) -> None:
    """Call `function(call)` before each training step."""
    _add(_before, function, "train_step")


def around_forward(function: Callable[[Any, dict[str, Any]], AbstractContextManager[Any]]) -> None:
    """Run each training forward pass of a chunk, with this microbatch, inside `function(model, batch)`."""
    _add(_forward, function)


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


def around_checkpoint(
    before: Callable[[dict[str, Any]], None], after: Callable[[dict[str, Any]], None]
) -> None:
    """Call `before(call)` and `after(call)` around each checkpoint that is written, or loaded after the first step."""
    _add(_checkpoint, (before, after), "save_checkpoint")


def on_experts_move(function: Callable[[Callable[[Callable[[Tensor], Tensor]], None]], None]) -> None:
    """Call `function(carry)` on every rank before the weights of experts go to other ranks.

    A feature that keeps a tensor for each parameter calls `carry(tensor_of)`, where `tensor_of(parameter)` is that
    tensor, of the parameter's shape: then it has moved with the expert.
    """
    _add(_move, function)


def _add(functions: list[Any], function: Any, *patches: str) -> None:
    install(patches)
    if function not in functions:
        functions.append(function)


def validated(args: Any) -> None:
    """Told by the patch `validate_args`."""
    for function in _validated:
        function(args)


def building(config: Any, pg_collection: Any) -> None:
    """Told by the model's builder."""
    for function in _build:
        function(config, pg_collection)


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


def forward(model: Any, batch: dict[str, Any]) -> ExitStack:
    """The contexts in which the trainer's forward step calls a chunk."""
    contexts = ExitStack()
    for function in _forward:
        contexts.enter_context(function(model, batch))
    return contexts


def saw_output(model: Any, output: Tensor) -> None:
    """Told by whoever runs a chunk forward: the trainer's forward step, or the schedule that runs its plan."""
    for function in _output:
        function(model, output)


def saw_loss(total: Tensor, num_tokens: Tensor) -> None:
    """Told by the loss function."""
    for function in _loss:
        function(total, num_tokens)


@contextmanager
def checkpoint(call: dict[str, Any]) -> Iterator[None]:
    """Around writing or loading a checkpoint; used by the patch `save_checkpoint`, and where one is loaded again."""
    for before, _ in _checkpoint:
        before(call)
    yield
    for _, after in reversed(_checkpoint):
        after(call)


def experts_move(carry: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
    """Told by whoever moves experts."""
    for function in _move:
        function(carry)


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
