"""What becomes of every option of Megatron's: honoured, without meaning here (said), or refused (`options.toml`)."""

import argparse
import math
import tomllib
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_megatron.arguments.surroundings import Surroundings

__all__ = ["OPTIONS", "Group", "Options", "fate_of", "notes", "refusals", "without_meaning", "wrong_numbers"]

FATES = ("honoured", "idle", "refused")


@dataclass(frozen=True)
class Group:
    """Options with one fate.

    Attributes:
        title: for people.
        fate: "honoured", "idle" or "refused".
        names: Megatron's names of the arguments.
        how, shown: what honours them, and the test that shows it ("Megatron's own": passed through untouched).
        needs: without it they have no meaning: `other`, `other=value`, `other!=value`, alternatives with `|`.
        why, use: of idle and refused ones; a refused one without them has a row of its own.
        about: "model" for what makes a model what it is.
    """

    title: str
    fate: str
    names: tuple[str, ...]
    how: str = ""
    shown: str = ""
    needs: str = ""
    why: str = ""
    use: str = ""
    about: str = ""


@dataclass(frozen=True)
class Options:
    """The table.

    Attributes:
        groups: in the file's order.
        by_name: the group of each argument.
        other_fields: fields of the model's configuration that do not make it another model.
        numbers: which arguments may be which numbers.
    """

    groups: tuple[Group, ...]
    by_name: dict[str, Group] = field(repr=False)
    other_fields: frozenset[str] = field(repr=False)
    numbers: dict[str, frozenset[str]] = field(repr=False)


def _load() -> Options:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    groups = tuple(Group(**{**row, "names": tuple(row["names"])}) for row in table["options"])
    by_name = {name: group for group in groups for name in group.names}
    fields = [*table["fields"]["names"], *table["fields"]["training"]]
    fields += [name for name, group in by_name.items() if group.about != "model" or group.fate == "refused"]
    numbers = {kind: frozenset(names) for kind, names in table["numbers"].items()}
    return Options(groups, by_name, frozenset(fields), numbers)


OPTIONS = _load()


def fate_of(dest: str) -> str:
    """ "honoured", "idle", "refused"; our own options, which the table does not list, are honoured."""
    group = OPTIONS.by_name.get(dest)
    return "honoured" if group is None else group.fate


def option_name(dest: str, value: object, parser: ArgumentParser) -> str:
    """The option that gives `dest` this value, e.g. `--fp8-format` for `fp8`."""
    actions = [action for action in parser._actions if action.dest == dest and action.option_strings]
    exact = [action for action in actions if action.nargs == 0 and action.const is value]
    return (exact or actions)[0].option_strings[0]


def _typed(dest: str, value: Any, parser: ArgumentParser) -> str:
    """The option with its value, as it was typed."""
    option = option_name(dest, value, parser)
    if isinstance(value, bool) or value is None:
        return option
    return f"{option} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def refusals(given: Namespace, parser: ArgumentParser) -> list[str]:
    """An error for each given option that is refused whatever the others are, and for each impossible number."""
    defaults = _defaults(parser)
    messages = []
    for dest, value in vars(given).items():
        group = OPTIONS.by_name.get(dest)
        if group is None or group.fate != "refused" or not group.why or value == defaults.get(dest):
            continue
        messages.append(f"{_typed(dest, value, parser)}: {group.why}. Use {group.use}.")
    return messages + wrong_numbers(given, parser)


def _defaults(parser: ArgumentParser) -> dict[str, Any]:
    return {action.dest: action.default for action in parser._actions}


def wrong_numbers(given: Namespace, parser: ArgumentParser) -> list[str]:
    """An error for each given number that its option cannot be."""
    messages = []
    for action in parser._actions:
        value = getattr(given, action.dest, None)
        is_number = action.type in (int, float) or action.dest in OPTIONS.numbers["whole_from_0"]
        if is_number and value is not None and fate_of(action.dest) == "honoured":
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    wanted = _violated(action, number)
                    if wanted:
                        messages.append(
                            f"{action.option_strings[0]} {number}: is not possible. Use {wanted}."
                        )
    return messages


def _violated(action: Action, number: float) -> str:
    """What a number must be, "" where it is."""
    kinds, dest = OPTIONS.numbers, action.dest
    if not math.isfinite(number):
        return "a finite number"
    if dest in kinds["any"] or action.choices is not None:
        return ""
    whole = isinstance(number, int)
    if dest in kinds["above_0"]:
        return "" if number > 0 else "a number above 0"
    if dest in kinds["below_1"]:
        return "" if 0 <= number < 1 else "a number from 0 to below 1"
    if dest in kinds["up_to_1"]:
        return "" if 0 <= number <= 1 else "a number from 0 to 1"
    if whole and dest not in kinds["whole_from_0"]:
        return "" if number >= 1 else "a whole number from 1"
    return "" if number >= 0 else f"{'a whole number' if whole else 'a number'} from 0"


def without_meaning(
    given: Namespace, args: Namespace, parser: ArgumentParser, around: Surroundings
) -> dict[str, str]:
    """Given arguments that have no meaning here, and why."""
    reasons = {}
    silent = _of_runtime(parser) if around.on_cpu else set()
    for dest in vars(given):
        group = OPTIONS.by_name.get(dest)
        if group is None or dest in silent:
            continue
        if group.fate == "idle":
            reasons[dest] = f"no meaning here: it {group.why}"
        elif group.needs and not _is_met(group.needs, args):
            reasons[dest] = f"no meaning here without {_needed(group.needs, parser)}"
    tokenizer = getattr(args, "tokenizer_type", None)
    if hasattr(given, "vocab_size") and tokenizer not in (None, "NullTokenizer", "TikTokenizer"):
        text = f"{tokenizer} brings its own vocabulary; --padded-vocab-size gives the embedding's rows"
        reasons["vocab_size"] = f"no meaning here: {text}"
    return reasons


def notes(given: Namespace, args: Namespace, parser: ArgumentParser, around: Surroundings) -> list[str]:
    """A line for each given option that has no meaning here."""
    reasons = without_meaning(given, args, parser, around)
    return [f"> {_typed(dest, getattr(given, dest), parser)} has {why}" for dest, why in reasons.items()]


def _of_runtime(parser: ArgumentParser) -> set[str]:
    """What the CPU runtime gives by itself."""
    from dsv3_megatron.cpu import CPU_FLAGS

    options = {
        action_option: action.dest for action in parser._actions for action_option in action.option_strings
    }
    return {options[flag] for flag in CPU_FLAGS if flag in options}


def _conditions(needs: str) -> Iterator[tuple[str, str, str]]:
    """(argument, "", "=" or "!=", value) of each alternative."""
    for text in needs.split("|"):
        sign = "!=" if "!=" in text else "=" if "=" in text else ""
        name, _, value = text.partition(sign) if sign else (text, "", "")
        yield name, sign, value


def _is_met(needs: str, args: Namespace) -> bool:
    for name, sign, wanted in _conditions(needs):
        value = getattr(args, name, None)
        met = {"": bool(value), "=": str(value) == wanted, "!=": str(value) != wanted}[sign]
        if met:
            return True
    return False


def _needed(needs: str, parser: ArgumentParser) -> str:
    words = []
    for name, sign, value in _conditions(needs):
        option = option_name(name, True, parser)
        words.append(f"{option} {'' if sign != '!=' else 'other than '}{value}".strip())
    return " or ".join(words)


def every_dest(parser: ArgumentParser) -> set[str]:
    """Names of all arguments of a parser but help."""
    return {a.dest for a in parser._actions if not isinstance(a, argparse._HelpAction)}
