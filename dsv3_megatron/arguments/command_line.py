"""What the user gave: a Megatron command line parsed without Megatron's defaults."""

import argparse
import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.dispatch import arguments as dispatch_arguments
from dsv3_megatron.dualpipe import arguments as dualpipe_arguments
from dsv3_megatron.ema import arguments as ema_arguments
from dsv3_megatron.expert_placement import arguments as placement_arguments
from dsv3_megatron.fp8 import arguments as fp8_arguments
from dsv3_megatron.recipe import arguments as recipe_arguments
from dsv3_megatron.resilience import arguments as resilience_arguments
from dsv3_megatron.sft import arguments as sft_arguments

_YARN = (
    ("--original-max-position-embeddings", int, 4096),
    ("--beta-fast", float, 32.0),
    ("--beta-slow", float, 1.0),
)


class _QuietParser(ArgumentParser):
    """A parser whose errors are short: Megatron's usage text lists 800 options."""

    def error(self, message: str) -> NoReturn:
        raise RefusedArgument(f"{message} (all options: --help)")


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our own options to a Megatron parser; usable as Megatron's `extra_args_provider`."""
    # Megatron takes None, not 0, for "no MTP" and "no query compression", and has no option that says so.
    for action in parser._actions:
        if action.dest in ("mtp_num_layers", "q_lora_rank"):
            action.type = _number_or_none
    dualpipe_arguments.add_arguments(parser)
    dispatch_arguments.add_arguments(parser)
    placement_arguments.add_arguments(parser)
    fp8_arguments.add_arguments(parser)
    recipe_arguments.add_arguments(parser)
    ema_arguments.add_arguments(parser)
    resilience_arguments.add_arguments(parser)
    sft_arguments.add_arguments(parser)
    group = parser.add_argument_group("dsv3")
    # Fields of MLA's configuration that Megatron has no options for; it takes arguments by the fields' names.
    for option, kind, value in _YARN:
        group.add_argument(option, type=kind, default=value, help="of --rope-type yarn (default %(default)s)")
    group.add_argument(
        "--allow-deviation",
        nargs="+",
        default=[],
        metavar="NAME",
        help="training settings that may differ from DeepSeek-V3's, e.g. `weight_decay adam_beta2`",
    )
    return parser


def _number_or_none(text: str) -> int | None:
    return int(text) or None


def megatron_parser() -> ArgumentParser:
    """Megatron's whole parser with our options, its errors raised as `RefusedArgument`."""
    from megatron.training.arguments import add_megatron_arguments

    parser = _QuietParser(prog="dsv3_megatron.train", allow_abbrev=False)
    return add_arguments(add_megatron_arguments(parser))


def parse(parser: ArgumentParser, argv: Sequence[str], known_only: bool = False) -> Namespace:
    """Parse with the parser's defaults; an unknown option names its nearest neighbours, or is ignored."""
    args, unknown = parser.parse_known_args(list(argv))
    if unknown and not known_only:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise RefusedArgument(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def parse_given(parser: ArgumentParser, argv: Sequence[str], known_only: bool = False) -> Namespace:
    """Only what the command line gives, in parsed form; options that were left out are absent.

    The parser's defaults are put back before returning.
    """
    defaults = [(action, action.default) for action in parser._actions]
    try:
        for action, _ in defaults:
            action.default = argparse.SUPPRESS
        return parse(parser, argv, known_only)
    finally:
        for action, default in defaults:
            action.default = default
