"""The learning-rate schedule of a run and of the checkpoint that it goes on from.

Megatron keeps the schedule's constants in the checkpoint and compares them when it loads the optimizer, after the model
is built; `--override-opt-param-scheduler` goes on with the run's, `--use-checkpoint-opt-param-scheduler` with the
checkpoint's.
"""

import math
from argparse import Namespace
from typing import Any

from dsv3_megatron.checkpoint.recorded import Recorded
from dsv3_megatron.recipe.arguments import schedules_of
from dsv3_megatron.recipe.schedules import LAST_PHASE

__all__ = ["differences", "of_checkpoint", "planned", "reads_schedule"]

_LENGTH = "--train-iters / --train-samples / --train-tokens"
# A constant by Megatron's name: the option that sets it, and former names in checkpoints.
OPTIONS: dict[str, tuple[str, ...]] = {
    "init_lr": ("--lr-warmup-init",),
    "max_lr": ("--lr", "start_lr"),
    "min_lr": ("--min-lr",),
    "lr_warmup_steps": (
        "--lr-warmup-iters / --lr-warmup-samples / --lr-warmup-fraction",
        "warmup_iter",
        "warmup_steps",
    ),
    "lr_decay_steps": (f"--lr-decay-iters / --lr-decay-samples / {_LENGTH}", "end_iter", "decay_steps"),
    "lr_decay_style": ("--lr-decay-style", "decay_style"),
    "wsd_decay_steps": ("--lr-wsd-decay-iters / --lr-wsd-decay-samples",),
    "lr_wsd_decay_style": ("--lr-wsd-decay-style",),
    "start_wd": ("--weight-decay / --start-weight-decay",),
    "end_wd": ("--weight-decay / --end-weight-decay",),
    "wd_incr_steps": (_LENGTH,),
    "wd_incr_style": ("--weight-decay-incr-style",),
    "last_phase": ("--train-tokens",),
    "last_lr": ("--last-lr",),
}
OF_WSD = ("wsd_decay_steps", "lr_wsd_decay_style")
NOT_IN_STATE = ("init_lr", *OF_WSD)  # Megatron keeps them in the arguments only


def reads_schedule(args: Namespace) -> bool:
    """Whether an option says what becomes of the checkpoint's schedule."""
    return bool(args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler)


def planned(args: Namespace, data_parallel_size: int = 1) -> dict[str, Any] | None:
    """The constants of Megatron's scheduler for these arguments, counted in samples; None where there is no schedule.

    Args:
        args: complete, validated or not.
        data_parallel_size: replicas of the model, which give a missing `--global-batch-size`.
    """
    batch = args.global_batch_size or args.micro_batch_size * data_parallel_size
    if args.train_samples:
        decay, total = args.lr_decay_samples or args.train_samples, args.train_samples
        warmup, wsd_decay = args.lr_warmup_samples, args.lr_wsd_decay_samples
    elif args.train_iters:
        decay = (args.lr_decay_iters or args.train_iters) * batch
        total, warmup = args.train_iters * batch, args.lr_warmup_iters * batch
        wsd_decay = None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * batch
    else:
        return None
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    constant = args.weight_decay_incr_style == "constant"
    return {
        "init_lr": args.lr_warmup_init,
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "wsd_decay_steps": wsd_decay,
        "lr_wsd_decay_style": args.lr_wsd_decay_style,
        "start_wd": args.weight_decay if constant else args.start_weight_decay,
        "end_wd": args.weight_decay if constant else args.end_weight_decay,
        "wd_incr_steps": total,
        "wd_incr_style": args.weight_decay_incr_style,
        **_last_phase(args),
    }


def _last_phase(args: Namespace) -> dict[str, Any]:
    schedules = schedules_of(args)
    if schedules is None:
        return {}
    return {"last_phase": schedules.samples(LAST_PHASE), "last_lr": schedules.last_lr}


def of_checkpoint(recorded: Recorded) -> dict[str, Any] | None:
    """The constants of the schedule in a checkpoint, None where it has none."""
    if recorded.scheduler is None:
        return None
    state = {
        name: recorded.scheduler[key]
        for name, (_, *former) in OPTIONS.items()
        for key in (name, *former)
        if key in recorded.scheduler
    }
    args = (
        planned(recorded.args)
        if recorded.args is not None and hasattr(recorded.args, "train_iters")
        else None
    )
    return {name: value for name, value in (args or {}).items() if name in NOT_IN_STATE} | state


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`--lr 0.003 (this run: 0.001)` for each constant that differs."""
    found: dict[str, str] = {}
    wsd = recorded.get("lr_decay_style") == now["lr_decay_style"] == "WSD"
    for name, (option, *_) in OPTIONS.items():
        if name not in recorded or (name in OF_WSD and not wsd):
            continue
        before, after = recorded[name], now.get(name)
        if not _same(before, after):
            unit = " samples" if name.endswith(("_steps", "_phase")) else ""
            found.setdefault(option, f"{option} {_shown(before)}{unit} (this run: {_shown(after)}{unit})")
    return list(found.values())


def _same(a: Any, b: Any) -> bool:
    """Megatron compares for equality; what was computed in another order is not worth an error."""
    return math.isclose(a, b, rel_tol=1e-12) if _is_number(a) and _is_number(b) else a == b


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.10g}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
