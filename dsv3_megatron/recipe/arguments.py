"""`--train-tokens` and its relatives: the options, and what they mean as Megatron's own arguments."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_megatron.recipe.ramp import BatchRamp
from dsv3_megatron.recipe.schedules import (
    CONSTANT_END,
    COSINE_END,
    GAMMA,
    LAST_LR,
    LR,
    MIN_LR,
    MTP_WEIGHT,
    PUBLISHED_TOKENS,
    WARMUP_END,
    Schedules,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the training recipe to Megatron's parser."""
    group = parser.add_argument_group("dsv3 training recipe")
    group.add_argument(
        "--train-tokens",
        type=_whole_number,
        metavar="N",
        help="train for N tokens on DeepSeek-V3's schedules, all borders scaled from 14.8T to N: learning rate, bias "
        "update rate, MTP weight and, with --batch-ramp, batch size",
    )
    group.add_argument(
        "--batch-ramp",
        type=int,
        nargs=2,
        metavar=("START", "INCREMENT"),
        help="grow the batch from START sequences to --global-batch-size, over the share 469B/14.8T of "
        "--train-tokens (DeepSeek-V3: 3072 to 15360; increments unpublished, 768 in recipe=v3_pretrain)",
    )
    group.add_argument(
        "--last-lr",
        type=float,
        help="learning rate of the last phase of --train-tokens (default: --lr × 7.3e-6/2.2e-4)",
    )


def _whole_number(text: str) -> int:
    """`14.8e12` as an integer."""
    number = float(text)
    if number != int(number) or number < 1:
        raise ValueError(text)
    return int(number)


def schedules_of(args: Any) -> Schedules | None:
    """The schedules of parsed arguments (some may still be absent), None without `--train-tokens`.

    Raises:
        ValueError: the batch ramp does not fit; the message names the option.
    """
    if getattr(args, "train_tokens", None) is None:
        return None
    lr = _given(args, "lr", LR)
    ramp = _given(args, "batch_ramp", None)
    return Schedules(
        train_tokens=args.train_tokens,
        seq_length=_given(args, "seq_length", 4096),
        lr=lr,
        min_lr=_given(args, "min_lr", default_min_lr(lr)),
        last_lr=_given(args, "last_lr", default_last_lr(lr)),
        batch_size=_given(args, "global_batch_size", 1),
        batch_ramp=None if ramp is None else tuple(ramp),
        gamma=_given(args, "moe_router_bias_update_rate", GAMMA),
        mtp_weight=_given(args, "mtp_loss_scaling_factor", MTP_WEIGHT),
    )


def _given(args: Any, name: str, default: Any) -> Any:
    value = getattr(args, name, None)
    return default if value is None else value


def default_min_lr(lr: float) -> float:
    """A tenth of the peak, as published."""
    return MIN_LR if lr == LR else lr / 10


def default_last_lr(lr: float) -> float:
    """The published share of the peak."""
    return LAST_LR if lr == LR else lr * LAST_LR / LR


# Megatron's arguments that `--train-tokens` decides, with their values.
MEGATRON_ARGUMENTS: dict[str, Callable[[Schedules], Any]] = {
    "train_samples": lambda s: s.samples(PUBLISHED_TOKENS),
    "lr_warmup_samples": lambda s: s.samples(WARMUP_END),
    "lr_decay_style": lambda s: "WSD",
    "lr_decay_samples": lambda s: s.samples(COSINE_END),
    "lr_wsd_decay_style": lambda s: "cosine",
    "lr_wsd_decay_samples": lambda s: s.samples(COSINE_END) - s.samples(CONSTANT_END),
    "last_lr": lambda s: s.last_lr,
}


def conflicts(args: Namespace) -> list[str]:
    """Options given beside `--train-tokens` that say something else than it does."""
    schedules = schedules_of(args)
    if schedules is None:
        return []
    names = {**MEGATRON_ARGUMENTS, "min_lr": lambda s: s.min_lr}
    wrong = [name for name, value in names.items() if getattr(args, name) != value(schedules)]
    others = ("train_iters", "lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters", "lr_warmup_fraction")
    wrong += [name for name in (*others, "step_batch_size_schedule") if getattr(args, name)]
    return ["--" + name.replace("_", "-") for name in wrong]


def ramp_of(args: Any) -> BatchRamp | None:
    """The batch sizes of these arguments, by `--batch-ramp` or Megatron's `--step-batch-size-schedule`.

    None for a constant batch.

    Raises:
        ValueError: the ramp does not fit.
    """
    if getattr(args, "batch_ramp", None) and getattr(args, "train_tokens", None):
        schedules = schedules_of(args)
        return None if schedules is None else schedules.ramp
    text = getattr(args, "step_batch_size_schedule", None)
    if not text:
        return None
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    pairs = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(text, args.seq_length)
    return BatchRamp(tuple(threshold for threshold, _ in pairs), tuple(size for _, size in pairs))


def first_sample(args: Any, ramp: BatchRamp) -> int:
    """Samples consumed when this run begins: where the checkpoint that `--load` names left off."""
    if not getattr(args, "load", None) or getattr(args, "finetune", False):
        return 0
    if getattr(args, "ckpt_step", None):
        return ramp.samples_after(args.ckpt_step)
    tracker = Path(args.load) / "latest_checkpointed_iteration.txt"
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return ramp.samples_after(int(text)) if text.isdigit() else 0


def apply(args: Any) -> None:
    """After Megatron's validation: the ramp becomes its `--step-batch-size-schedule`.

    Not before, as Megatron takes that option or `--global-batch-size`, which here is the end of the ramp and which
    evaluation goes by.
    """
    schedules = schedules_of(args)
    if schedules is not None and schedules.batch_ramp is not None:
        args.step_batch_size_schedule = schedules.ramp.megatron_schedule(args.seq_length)
