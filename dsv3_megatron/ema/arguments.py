"""The options of the average of the weights."""

from argparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Add `--ema-decay` and `--eval-ema` to Megatron's parser."""
    group = parser.add_argument_group("dsv3 average of the weights")
    group.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help="keep an exponential moving average of the weights in CPU memory: D of the past and 1 - D of the weights "
        "after each step (DeepSeek-V3's D is unpublished)",
    )
    group.add_argument(
        "--eval-ema",
        action="store_true",
        help="evaluate the average in place of the weights; with --skip-train it is what is loaded, evaluated and "
        "exported (--ckpt-convert-format)",
    )
