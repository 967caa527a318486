"""`--eval-tasks` and `--eval-tasks-interval`: evaluation of a model while it is trained."""

from argparse import ArgumentParser

__all__ = ["add_arguments"]


def add_arguments(parser: ArgumentParser) -> None:
    """Add our options to Megatron's parser."""
    group = parser.add_argument_group("dsv3 evaluation")
    group.add_argument(
        "--eval-tasks",
        nargs="+",
        metavar="NAME",
        help="tasks of dsv3 evaluate, divided by commas or spaces, evaluated every --eval-tasks-interval steps; "
        "results go to TensorBoard",
    )
    group.add_argument(
        "--eval-tasks-interval", type=int, metavar="STEPS", help="between two evaluations of --eval-tasks"
    )
    group.add_argument(
        "--eval-tasks-limit",
        type=int,
        metavar="N",
        help="documents of each of the --eval-tasks, the first ones",
    )
