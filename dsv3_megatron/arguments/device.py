"""`--device`: ours, and taken off the command line before Megatron, which has no such option, is imported."""

import argparse
from collections.abc import Sequence

from dsv3_megatron.arguments.errors import RefusedArgument


def split_device(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The device ("cuda" where none is given) and the other words.

    Raises:
        RefusedArgument: it is neither cuda nor cpu.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    known, words = parser.parse_known_args(list(argv))
    if known.device not in ("cuda", "cpu"):
        raise RefusedArgument(f"--device {known.device}: use cuda (the default) or cpu")
    return known.device, words
