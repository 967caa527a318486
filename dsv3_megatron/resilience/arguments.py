"""Options for failures: how long a rank may be silent, and what a bad step leads to."""

from argparse import ArgumentParser

ACTIONS = ("stop", "skip", "rewind")


def add_arguments(parser: ArgumentParser) -> None:
    """Add our options to Megatron's parser."""
    group = parser.add_argument_group("dsv3 resilience")
    group.add_argument(
        "--rank-timeout-s",
        type=float,
        default=120.0,
        help="a rank that gives no sign of life for so long is lost: all ranks name it and end",
    )
    group.add_argument(
        "--on-bad-step",
        choices=ACTIONS,
        default="stop",
        help="a step with NaN, Inf or a loss spike: stop: end the run; skip: leave the step out; rewind: leave it out "
        "and take weights, moments and biases from the newest checkpoint of --save",
    )
    group.add_argument(
        "--loss-spike-factor",
        type=float,
        metavar="F",
        help="a microbatch's loss above F times the median of the last 100 is a bad step (default: no loss is)",
    )
