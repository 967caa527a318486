"""`--eval-tasks`: the model is evaluated while it is trained, by the trainer's own pipeline; training is not changed by
it, to the bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation import catalog
from dsv3_megatron.evaluation.setting import Setting, use

__all__ = ["install"]

_tasks: Any = None  # on the leader
_tokenizer: Any = None


def install(args: Any) -> None:
    """Follow `--eval-tasks` in this process; nothing happens without them.

    Args:
        args: validated.

    Raises:
        RefusedArgument: the tokenizer cannot be opened, or a task's data is not on this machine.
    """
    if not args.eval_tasks:
        return
    from dsv3_megatron.evaluation.ranks import LEADER
    from dsv3_megatron.evaluation.text import open_tokenizer
    from dsv3_megatron.training import hooks

    global _tasks, _tokenizer
    _tokenizer = open_tokenizer(Path(args.tokenizer_model))
    if args.rank == LEADER:
        use(Setting(max_length=args.seq_length, count=lambda text: len(_tokenizer.encode(text))))
        _tasks = _loaded(args)
    hooks.after_step(_after_step)


def _loaded(args: Any) -> Any:
    """The tasks, each of which is possible here."""
    from dsv3_megatron.evaluation.model import generation
    from dsv3_megatron.evaluation.run import check

    loaded = catalog.load_tasks(catalog.split_names(args.eval_tasks), option="--eval-tasks")
    check(loaded, option="--eval-tasks")
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            how = task.config.generation_kwargs or {}
            generation(how, f"--eval-tasks {name}", args.seq_length, samples=False)
    return loaded


def _after_step(call: dict[str, Any], result: Any) -> None:
    """Every so many steps, on every rank."""
    from megatron.training import get_args

    from dsv3_megatron.resilience.watch import note

    args = get_args()
    iteration = _steps_done(args)
    if iteration % args.eval_tasks_interval == 0:
        note(f"evaluating after step {iteration}")
        with _undisturbed(args, call):
            _evaluate(args, call["model"], iteration)


def _steps_done(args: Any) -> int:
    return args.curr_iteration + 1


def _evaluate(args: Any, model: list[Any], iteration: int) -> None:
    import torch.distributed as dist
    from megatron.training.utils import print_rank_last

    from dsv3_megatron.evaluation.ranks import LEADER, follow, leading
    from dsv3_megatron.evaluation.trainer_scorer import TrainerScorer

    ends: list[int] = [] if _tokenizer.eos_token_id is None else [_tokenizer.eos_token_id]
    scorer = TrainerScorer(model, ends, _tokenizer.decode)
    box: list[Any] = [None]
    if dist.get_rank() == LEADER:
        from dsv3_megatron.evaluation.model import HarnessModel
        from dsv3_megatron.evaluation.run import figures, run

        try:
            with leading(scorer) as leader:
                answering = HarnessModel(_tokenizer, leader, report=lambda line: print(line, flush=True))
                box[0] = figures(run(answering, _tasks, limit=args.eval_tasks_limit, bootstraps=0))
        except RefusedArgument as error:  # of a document, or a metric: no reason to end a training
            box[0] = str(error)
    else:
        follow(scorer)
    dist.broadcast_object_list(box, src=LEADER)
    if isinstance(box[0], str):
        print_rank_last(f" evaluation at iteration {iteration} FAILED | {box[0]}")
        return
    scalars = {
        f"eval/{task}/{name.removesuffix(',none')}": value
        for task, values in box[0].items()
        for name, value in values.items()
        if value is not None
    }
    _to_tensorboard(scalars, iteration)
    shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in scalars.items())
    print_rank_last(f" evaluation at iteration {iteration} | {shown}")


def _to_tensorboard(scalars: dict[str, float], iteration: int) -> None:
    from megatron.training import get_tensorboard_writer

    writer = get_tensorboard_writer()  # there is one on the last rank only
    if writer is None:
        return
    for name, value in scalars.items():
        writer.add_scalar(name, value, iteration)
    writer.flush()


@contextmanager
def _undisturbed(args: Any, call: dict[str, Any]) -> Iterator[None]:
    """The model as an evaluation wants it; afterwards everything is as it was, random numbers and clocks too."""
    import torch
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.utils import get_model_config
    from megatron.training import get_timers, training

    from dsv3_megatron.ema.trainer import average

    model, config = call["model"], get_model_config(call["model"][0])
    modes = [(module, module.training) for chunk in model for module in chunk.modules()]
    tracker, rerun, clock = get_cuda_rng_tracker(), get_rerun_state_machine(), get_timers()("interval-time")
    states, mode, timers = tracker.get_states(), rerun.get_mode(), config.timers
    device_state = torch.cuda.get_rng_state()
    gathers = training.should_disable_forward_pre_hook(args)
    # Megatron itself has none before the end of the first step.
    gathers_by_hook = gathers and bool(model[0].remove_forward_pre_hook_handles)
    clock.stop()
    if gathers_by_hook:
        training.disable_forward_pre_hook(model, call["optimizer"])  # gathers now
    elif gathers:
        training.force_param_sync(model, call["optimizer"])
    for chunk in model:
        chunk.eval()
    rerun.set_mode(RerunMode.DISABLED)
    config.timers = None
    weights = average()
    try:
        with weights.in_place() if args.eval_ema and weights is not None else nullcontext():
            yield
    finally:
        config.timers = timers
        rerun.set_mode(mode)
        for module, training_mode in modes:
            module.training = training_mode
        if gathers_by_hook:
            training.enable_forward_pre_hook(model)
        torch.cuda.set_rng_state(device_state)
        tracker.set_states(states)
        clock.start()
