"""`pretrain_gpt.py --spec dsv3_megatron.specs dsv3`: a Megatron-LM that knows nothing of us imports our
specs.

Its arguments are parsed by then, so they can only be checked. No process group exists yet.
"""

import sys
from argparse import ArgumentParser, Namespace

from dsv3_megatron.arguments.command_line import megatron_parser, parse, parse_given
from dsv3_megatron.arguments.complete import FULL_SPEC, refuse_contradictions, words_from_checkpoint
from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.refusals import check
from dsv3_megatron.arguments.setting import NOT_SET, same
from dsv3_megatron.arguments.settings import SETTINGS
from dsv3_megatron.resilience.lock import hold_until_exit


def when_specs_are_imported() -> None:
    """If Megatron imports the specs because of its command line, check that and install our optimizer and
    metrics.

    Raises:
        RefusedArgument: see `check_command_line`.
    """
    words = sys.argv[1:]
    if not _names_our_spec(words) or not _megatron_has_parsed():
        return
    args = check_command_line(words)
    hold_until_exit(args.save, args.skip_train, args.rank_timeout_s)
    from dsv3_megatron import metrics, optimizer
    from dsv3_megatron.patching import repairs

    repairs.install()
    optimizer.install()
    metrics.install()


def check_command_line(words: list[str]) -> Namespace:
    """Check the words after the program's name; all arguments.

    Raises:
        RefusedArgument: a DeepSeek-V3 setting is missing (the message lists the words to add) or
            contradicted, or the combination is unsupported.
    """
    parser = megatron_parser()
    given = parse_given(parser, words, known_only=True)
    from_checkpoint = words_from_checkpoint(given, parser)
    given = parse_given(parser, [*words, *from_checkpoint], known_only=True)
    refuse_contradictions(given, parser)
    missing = from_checkpoint + missing_words(given, parser)
    if missing:
        raise RefusedArgument(
            "--spec dsv3_megatron.specs dsv3 with an unpatched Megatron-LM: Megatron's defaults are not "
            "DeepSeek-V3's, and these are not given. Add (sizes may differ):\n  " + " ".join(missing)
        )
    args = parse(parser, words, known_only=True)
    check(args)
    return args


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
