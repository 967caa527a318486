"""The options of experts that move."""

from argparse import ArgumentParser

PLACEMENTS = ("fixed", "balanced")


def add_arguments(parser: ArgumentParser) -> None:
    """Add `--expert-placement` and its interval to Megatron's parser."""
    group = parser.add_argument_group("dsv3 expert placement")
    group.add_argument(
        "--expert-placement",
        choices=PLACEMENTS,
        default="fixed",
        help="balanced: place the experts of each layer on the ranks of their expert-parallel group by their load; "
        "fixed: rank r keeps the r-th stretch of experts (default)",
    )
    group.add_argument(
        "--expert-placement-interval",
        type=int,
        metavar="N",
        help="steps between two placements, and whose load counts (with --expert-placement balanced)",
    )
