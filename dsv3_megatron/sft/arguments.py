"""`--sft-data` and `--sft-epochs`: the options, and what they mean as Megatron's own arguments."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument

EPOCHS = 2  # R§5.1


def add_arguments(parser: ArgumentParser) -> None:
    """Add our options to Megatron's parser."""
    group = parser.add_argument_group("dsv3 fine-tuning")
    group.add_argument(
        "--sft-data",
        metavar="DIR",
        help="fine-tune on the packed conversations of a folder by python -m dsv3_megatron.sft.prepare; --seq-length, "
        "the tokenizer and --train-iters follow from it",
    )
    group.add_argument(
        "--sft-epochs",
        type=int,
        default=EPOCHS,
        help="how often --sft-data is gone through (default: %(default)s)",
    )


def report_of(args: Namespace) -> dict[str, Any] | None:
    """What the folder of `--sft-data` holds; None without the option, or where there is no such folder."""
    from dsv3_megatron.sft.prepare import read_report

    if getattr(args, "sft_data", None) is None:
        return None
    try:
        return read_report(Path(args.sft_data))
    except (OSError, ValueError):
        return None  # refused by the table, which names the option


def train_iters(args: Namespace) -> int | None:
    """Steps of all epochs; what is left of the last batch is not trained on."""
    report = report_of(args)
    batch = getattr(args, "global_batch_size", None)
    if report is None or not batch:
        return None
    return max(1, report["train"]["rows"] * getattr(args, "sft_epochs", EPOCHS) // batch)


def check(args: Namespace) -> None:
    """Whether the folder of `--sft-data` fits the other arguments.

    Raises:
        RefusedArgument: it does not.
    """
    report = report_of(args)
    if report is None:
        return
    if args.seq_length != report["seq_length"]:
        raise RefusedArgument(
            f"--seq-length {args.seq_length}: the rows of --sft-data {args.sft_data} have {report['seq_length']} "
            "tokens. Leave it out, or prepare the conversations for that length"
        )
    rows = report["train"]["rows"] * args.sft_epochs
    if rows < args.global_batch_size:
        raise RefusedArgument(
            f"--global-batch-size {args.global_batch_size}: --sft-data {args.sft_data} has {rows} rows in "
            f"{args.sft_epochs} epochs. Use a smaller batch"
        )
    if args.eval_iters and not report["valid"]["rows"]:
        raise RefusedArgument(
            f"--eval-iters {args.eval_iters}: --sft-data {args.sft_data} has no held-out conversations. Use 0, or "
            "prepare the conversations with a larger --valid-fraction"
        )
