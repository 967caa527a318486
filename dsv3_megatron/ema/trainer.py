"""Where the trainer keeps, saves, loads and evaluates the average."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dsv3_megatron.ema import checkpoint
from dsv3_megatron.ema.arguments import threads_of
from dsv3_megatron.ema.average import WeightAverage
from dsv3_megatron.errors import RefusedArgument

_average: WeightAverage | None = None


def install() -> None:
    """Follow `--ema-decay` and `--eval-ema` in this process; without them nothing changes. Idempotent."""
    from dsv3_megatron.patching import install as install_patches
    from dsv3_megatron.training import hooks

    install_patches(["generate_state_dict", "evaluate_and_print_results"])
    hooks.after_load(_after_load)
    hooks.before_step(_begin)
    hooks.before_update(_before_update)
    hooks.after_step(_after_step)
    hooks.on_experts_move(_on_experts_move)


def average() -> WeightAverage | None:
    """The average of this process, None before the first step or without `--ema-decay`."""
    return _average


def _args() -> Any:
    from megatron.training import get_args

    return get_args()


def _threads() -> int:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return threads_of(_args(), len(os.sched_getaffinity(0)), ranks)


def _begin(call: dict[str, Any]) -> None:
    """Before the first step: the average starts from the weights, unless a checkpoint had one."""
    global _average
    if _average is None and _args().ema_decay is not None:
        _average = WeightAverage(checkpoint.named_parameters(call["model"]), _args().ema_decay, _threads())


def _before_update(call: dict[str, Any]) -> None:
    if _average is not None:
        _average.wait()


def _after_step(call: dict[str, Any], result: Any) -> None:
    skipped = result[1]
    if _average is None or skipped:
        return
    if _args().overlap_param_gather:
        # Megatron would gather the new weights in the next forward pass; the average reads them from now on.
        from megatron.training.training import force_param_sync

        force_param_sync(call["model"], call["optimizer"])
    _average.update()


def _on_experts_move(carry: Callable[[Callable[[Any], Any]], None]) -> None:
    """The average of an expert's weights goes where they go."""
    if _average is None:
        return
    _average.wait()
    of_parameter = {id(p): _average.average[name] for name, p in _average.parameters.items()}
    carry(lambda parameter: of_parameter[id(parameter)])


def _after_load(call: dict[str, Any], iteration: int) -> None:
    after_load(call["ddp_model"], iteration)


def after_load(model: list[Any], iteration: int) -> None:
    """A checkpoint of this run's `--load` has been loaded: load its average too."""
    global _average
    args = _args()
    if args.ema_decay is None and not args.eval_ema:
        return
    folder = _loaded_from(args, iteration)
    has_average = folder is not None and checkpoint.is_in(folder)
    if args.eval_ema and args.skip_train and not has_average:
        raise RefusedArgument(
            f"--eval-ema: the checkpoint {folder or args.load} has no average. Use one saved with --ema-decay."
        )
    if not has_average:
        return
    loaded = WeightAverage(checkpoint.named_parameters(model), args.ema_decay or 0.5, _threads())
    assert folder is not None
    checkpoint.load(folder, model, loaded.average)
    if args.skip_train:
        loaded.put()  # nothing else than the average is wanted
    else:
        _average = loaded


def _loaded_from(args: Any, iteration: int) -> Path | None:
    """Folder of the loaded checkpoint, None where the run began anew."""
    from megatron.training.checkpointing import get_checkpoint_name

    if not iteration or args.load is None:
        return None
    return Path(get_checkpoint_name(args.load, iteration, release=False, return_base_dir=True))


def add_to_checkpoint(state: dict[str, Any], num_chunks: int) -> None:
    """Put the average into the state that is about to be saved."""
    if _average is None:
        return
    _average.wait()
    values = _average.average
    if _args().async_save:  # written later, while the average moves on
        values = {name: value.clone() for name, value in values.items()}
    names = ["model"] if num_chunks == 1 else [f"model{i}" for i in range(num_chunks)]
    model_state = {name: state[name] for name in names}
    state[checkpoint.PREFIX] = checkpoint.sharded(model_state, _average.parameters, values)


def evaluating(original: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Megatron's evaluation, of the average where `--eval-ema` asks for it."""
    use = _average is not None and _args().eval_ema
    assert _average is not None or not use
    with _average.in_place() if use and _average is not None else nullcontext():
        if use:
            call = {**call, "prefix": f"{call['prefix']} (average of the weights)"}
        return original(**call)
