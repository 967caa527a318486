"""`pretrain_gpt.py --spec dsv3_megatron.specs dsv3`: the arguments are parsed already, so they can only be checked.

Importing `dsv3_megatron.specs` calls `check_command_line`, which is before Megatron builds any process group.
"""

import sys
from argparse import ArgumentParser, Namespace

from dsv3_megatron.arguments.command_line import megatron_parser, parse_given
from dsv3_megatron.arguments.complete import FULL_SPEC, refuse_contradictions
from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.refusals import check
from dsv3_megatron.arguments.settings import NOT_SET, SETTINGS, same


def check_command_line() -> None:
    """Check this process's command line if it is Megatron's and names our spec in two words.

    Raises:
        RefusedArgument: a DeepSeek-V3 setting is missing (the message lists the words to add) or contradicted, or
            the combination is unsupported.
    """
    words = sys.argv[1:]
    if not _names_our_spec(words) or not _megatron_has_parsed():
        return
    parser = megatron_parser()
    given = parse_given(parser, words, known_only=True)
    refuse_contradictions(given, parser)
    missing = missing_words(given, parser)
    if missing:
        raise RefusedArgument(
            "--spec dsv3_megatron.specs dsv3 with an unpatched Megatron-LM: Megatron's defaults are not "
            "DeepSeek-V3's, and these are not given. Add (sizes may differ):\n  " + " ".join(missing)
        )
    check(parser.parse_known_args(words)[0])


def missing_words(given: Namespace, parser: ArgumentParser) -> list[str]:
    """Words for the settings of the model that were not given and that Megatron's defaults get wrong."""
    defaults = {action.dest: action.default for action in parser._actions}
    words: list[str] = []
    for setting in SETTINGS:
        wanted = setting.value_for(given)
        left_to_megatron = setting.kind == "run" or wanted is NOT_SET or hasattr(given, setting.dest)
        if not left_to_megatron and not same(defaults[setting.dest], wanted):
            words += setting.words(given)
    return words


def _names_our_spec(words: list[str]) -> bool:
    return any(words[i : i + 3] == ["--spec", *FULL_SPEC] for i in range(len(words)))


def _megatron_has_parsed() -> bool:
    from megatron.training import get_args

    try:
        return get_args().spec == FULL_SPEC
    except AssertionError:
        return False
