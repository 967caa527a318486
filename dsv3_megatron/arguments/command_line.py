"""What the user gave: a Megatron command line parsed without Megatron's defaults."""

import argparse
import itertools
import re
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from enum import Enum
from typing import Any, NoReturn

from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.foreign import unrecognized
from dsv3_megatron.checkpoint import arguments as checkpoint_arguments
from dsv3_megatron.dispatch import arguments as dispatch_arguments
from dsv3_megatron.dualpipe import arguments as dualpipe_arguments
from dsv3_megatron.ema import arguments as ema_arguments
from dsv3_megatron.evaluation import arguments as evaluation_arguments
from dsv3_megatron.expert_placement import arguments as placement_arguments
from dsv3_megatron.fp8 import arguments as fp8_arguments
from dsv3_megatron.posttrain import arguments as posttrain_arguments
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

    def _get_value(self, action: Action, arg_string: str) -> Any:
        """Megatron's functions that read values fail in many ways."""
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except ArgumentError:
            raise
        except Exception as error:
            text = f"invalid value: {arg_string!r} ({' '.join(str(error).split()) or type(error).__name__})"
            raise ArgumentError(action, text) from error


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
    checkpoint_arguments.add_arguments(parser)
    sft_arguments.add_arguments(parser)
    evaluation_arguments.add_arguments(parser)
    posttrain_arguments.add_arguments(parser)
    group = parser.add_argument_group("dsv3")
    # Fields of MLA's configuration that Megatron has no options for; it takes arguments by the fields' names.
    for option, kind, value in _YARN:
        group.add_argument(option, type=kind, default=value, help="of --rope-type yarn (default %(default)s)")
    group.add_argument(
        "--nvlink-domain-size",
        type=int,
        metavar="RANKS",
        help="neighbouring ranks that share NVLink, 72 on GB200 NVL72 (default: the ranks of a machine); a token's "
        "experts lie in at most --moe-router-group-topk such domains",
    )
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


_number_or_none.__name__ = "int"  # argparse tells it to people


def megatron_parser() -> ArgumentParser:
    """Megatron's whole parser with our options, its errors raised as `RefusedArgument`."""
    from megatron.training.arguments import add_megatron_arguments

    parser = _QuietParser(prog="dsv3_megatron.train", allow_abbrev=False)
    add_arguments(add_megatron_arguments(parser))
    for action in parser._actions:
        if action.help:  # one of Megatron's holds "10%.", which argparse cannot print
            action.help = re.sub(r"%%|%(?!\()", "%%", action.help)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str], known_only: bool = False) -> Namespace:
    """Parse with the parser's defaults; an unknown option is an error that says what to use, or ignored."""
    args, unknown = parser.parse_known_args(list(argv))
    if unknown and not known_only:
        raise RefusedArgument(unrecognized(unknown, parser))
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


def choices_of(action: Action) -> list[Any] | None:
    """What may be given; None for anything. Of enums their names, which are what the command line takes."""
    if action.choices is None:
        return None
    return [choice.name if isinstance(choice, Enum) else choice for choice in action.choices]


def words_for(parser: ArgumentParser, dest: str, value: Any) -> list[str]:
    """The words that give an argument this value, `[]` where it is Megatron's default and needs none.

    Raises:
        RefusedArgument: no option gives it.
    """
    actions = [action for action in parser._actions if action.dest == dest and action.option_strings]
    if value is None and actions[0].type is _number_or_none:
        return [actions[0].option_strings[0], "0"]
    for action in actions:
        option = action.option_strings[0]
        if action.nargs == 0 and action.const == value:
            return [option]
        if action.nargs == 0 or value is None:
            continue
        if action.nargs is None and isinstance(value, list):
            return [option, pattern(value)]
        return [option, *map(str, value)] if isinstance(value, list) else [option, str(value)]
    if any(action.default == value for action in actions):
        return []
    raise RefusedArgument(f"{dest}: no option gives it the value {value!r}")


def pattern(values: Sequence[Any]) -> str:
    """`[0]*3+[1]*58`, as Megatron reads the layers' kinds."""
    runs = [(value, len(list(group))) for value, group in itertools.groupby(values)]
    return "+".join(f"[{value}]*{count}" for value, count in runs)
