"""The average of the weights."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.table import Refusal

FEATURE = "Average of the weights"


def _nothing_to_evaluate(a: Namespace) -> bool:
    return a.eval_ema and a.ema_decay is None and not (a.skip_train and a.load)


ROWS = (
    Refusal(
        "ema_decay",
        FEATURE,
        "--ema-decay",
        "{ema_decay}",
        lambda a, s: a.ema_decay is not None and not 0 < a.ema_decay < 1,
        "is the share of the past in the average",
        "a number between 0 and 1, for instance 0.999",
        "--ema-decay 1.0",
    ),
    Refusal(
        "eval_without_ema",
        FEATURE,
        "--eval-ema",
        "",
        lambda a, s: _nothing_to_evaluate(a),
        "no average is kept in this run, and none is loaded to be evaluated",
        "--ema-decay as well, or --skip-train and --load with a checkpoint saved under --ema-decay",
        "--eval-ema",
    ),
    Refusal(
        "ema_checkpoint_format",
        FEATURE,
        "--ckpt-format",
        "{ckpt_format}",
        lambda a, s: (a.ema_decay is not None or a.eval_ema) and a.ckpt_format != "torch_dist",
        "the average is saved in Megatron's distributed checkpoints only",
        "--ckpt-format torch_dist (the default)",
        "--ema-decay 0.99 --ckpt-format torch",
    ),
)
