"""Fill in what the user did not give, refuse what contradicts it: from one command line to another.

The result is an ordinary Megatron command line, so the trainer, the patched `pretrain_gpt.py` and a printed
"equivalent command" all run the very same arguments.
"""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence

from dsv3_megatron.arguments.command_line import megatron_parser, parse, parse_given, words_for
from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.options import OPTIONS, notes, option_name, refusals
from dsv3_megatron.arguments.refusals import check
from dsv3_megatron.arguments.setting import NOT_SET, Setting
from dsv3_megatron.arguments.settings import SETTINGS
from dsv3_megatron.arguments.surroundings import Surroundings, detect
from dsv3_megatron.checkpoint.arguments import taken
from dsv3_megatron.fp8 import arguments as fp8_arguments

SHORT_SPEC = ["dsv3"]
FULL_SPEC = ["dsv3_megatron.specs", "dsv3"]


def complete(
    argv: Sequence[str],
    parser: ArgumentParser | None = None,
    known_only: bool = False,
    around: Surroundings | None = None,
) -> list[str]:
    """The command line with `--spec` spelled out and every DeepSeek-V3 setting that was not given.

    Args:
        argv: words after the program's name; `--spec dsv3`, the two-word form, or no `--spec` at all.
        parser: the parser that will read the result; Megatron's with our options when None.
        known_only: leave unknown words for somebody else to refuse.
        around: the machine; detected when None.

    Raises:
        RefusedArgument: a word is unknown, contradicts DeepSeek-V3, or the combination is unsupported.
    """
    parser = parser or megatron_parser()
    argv = _spell_out_spec(list(argv), parse_given(parser, argv, known_only))
    argv = fp8_arguments.spell_out(argv, parse_given(parser, argv, known_only))
    given = parse_given(parser, argv, known_only)
    argv = [*argv, *words_from_checkpoint(given, parser)]
    given = parse_given(parser, argv, known_only)
    refuse_contradictions(given, parser)
    completed = argv + missing_words(given)
    args = parse(parser, completed, known_only)
    around = around or detect()
    check(args, around)
    tell(notes(given, args, parser, around))
    return completed


def words_from_checkpoint(given: Namespace, parser: ArgumentParser) -> list[str]:
    """The words for what was not given and a converted checkpoint says; they are told on rank 0."""
    start, values = taken(given)
    words = [word for dest, value in values.items() for word in words_for(parser, dest, value)]
    if words:
        tell([f"> from {start}: {' '.join(words)}"])
    return words


def tell(lines: Iterable[str]) -> None:
    """Print lines on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, flush=True)


def missing_words(given: Namespace) -> list[str]:
    """The command-line words for every setting that was not given, in the table's order."""
    known = Namespace(**vars(given))
    words: list[str] = []
    for setting in SETTINGS:
        if hasattr(given, setting.dest):
            continue
        words += setting.words(known)
        value = setting.value_for(known)
        if value is not NOT_SET:
            setattr(known, setting.dest, value)
    return words


def refuse_contradictions(given: Namespace, parser: ArgumentParser) -> None:
    """Raise `RefusedArgument` for every given setting that is not DeepSeek-V3's or cannot be, all in one message."""
    allowed = list(getattr(given, "allow_deviation", []))
    _check_deviations(allowed)
    wrong = [
        setting
        for setting in SETTINGS
        if hasattr(given, setting.dest)
        and setting.dest not in allowed
        and not setting.accepts(getattr(given, setting.dest), given)
    ]
    messages = [contradiction(s, getattr(given, s.dest), given, parser) for s in wrong]
    told = {setting.dest for setting in wrong}
    others = Namespace(**{dest: value for dest, value in vars(given).items() if dest not in told})
    messages += refusals(others, parser)
    if messages:
        raise RefusedArgument("\n".join(messages))


def contradiction(setting: Setting, value: object, args: Namespace, parser: ArgumentParser) -> str:
    """The message for one contradicted setting."""
    option = option_name(setting.dest, value, parser)
    wanted = setting.value_for(args)
    text = f"{option} {_shown(value)} contradicts DeepSeek-V3: {setting.dest} is {_shown(wanted)}"
    if setting.also:
        text += f" (or {', '.join(_shown(other) for other in setting.also)})"
    text += f" [{setting.source}]. Leave {option} out"
    if setting.flag:
        text += f" or give {' '.join(setting.words(args))}"
    if setting.kind == "recipe":
        text += f"; to differ on purpose add --allow-deviation {setting.dest}"
    elif OPTIONS.by_name[setting.dest].about == "model":
        text += " only if DeepSeek-V3's is meant; another value is another model, which --spec dsv3 does not train"
    return text + "."


def _shown(value: object) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return ("on" if value else "off") if isinstance(value, bool | None) else str(value)


def _check_deviations(names: Iterable[str]) -> None:
    may = [setting.dest for setting in SETTINGS if setting.kind == "recipe"]
    for name in names:
        if name not in may:
            raise RefusedArgument(f"--allow-deviation {name}: only these may deviate: {', '.join(may)}")


def _spell_out_spec(argv: list[str], given: Namespace) -> list[str]:
    """Replace `--spec dsv3` by the two words that Megatron can import."""
    spec = getattr(given, "spec", None)
    if spec is None:
        return ["--spec", *FULL_SPEC, *argv]
    if spec == FULL_SPEC:
        return argv
    if spec != SHORT_SPEC:
        said = " ".join(["--spec", *spec])
        raise RefusedArgument(f"{said}: not this model's. Use --spec dsv3 (or {' '.join(FULL_SPEC)})")
    at = max(i for i, word in enumerate(argv) if word in ("--spec", "--spec=dsv3"))
    width = 1 if argv[at] == "--spec=dsv3" else 2
    return [*argv[:at], "--spec", *FULL_SPEC, *argv[at + width :]]
