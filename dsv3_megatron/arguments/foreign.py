"""Options of other launch scripts, which Megatron's parser does not know, and what to use for them (`foreign.toml`)."""

import difflib
import functools
import tomllib
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Foreign", "foreign_options", "hint", "unrecognized"]

FEW = 3  # hints that fit into a line


@dataclass(frozen=True)
class Foreign:
    """An option that others have.

    Attributes:
        of: whose it is.
        use: what to do, for people.
        becomes: its words in Megatron's options, `{}` for the value; "" where it is left out.
        rule: the function of `dsv3_megatron.adopt.rules` that knows, where it depends on other options.
    """

    of: str
    use: str
    becomes: str = ""
    rule: str = ""


@functools.cache
def foreign_options() -> dict[str, Foreign]:
    """Option, as it is typed, to what is known of it."""
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["options"]
    return {
        name: Foreign(row["of"], row["use"], row.get("becomes", ""), row.get("rule", ""))
        for row in rows
        for name in row["names"]
    }


def hint(option: str, parser: ArgumentParser) -> str:
    """What to use for an option that the parser does not know, "" when nothing is near."""
    known = foreign_options().get(option) or foreign_options().get(option.replace("_", "-"))
    if known is not None:
        return (
            f"an option of {known.of}: use {known.use}"
            if not known.use.startswith("leave")
            else f"an option of {known.of}: {known.use}"
        )
    names = [name for action in parser._actions for name in action.option_strings]
    near = difflib.get_close_matches(option, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def unrecognized(words: Sequence[str], parser: ArgumentParser) -> str:
    """The error for words that the parser has left over: a hint for each option among them."""
    text = f"unrecognized arguments: {' '.join(words)}"
    options = list(dict.fromkeys(word.split("=")[0] for word in words if word.startswith("--")))
    hints = [(option, found) for option in options if (found := hint(option, parser))]
    if len(options) == 1:
        return f"{text}; {hints[0][1]}" if hints else f"{text} (all options: --help)"
    if not hints:
        return f"{text} (all options: --help)"
    mark, end = (
        ("; ", "")
        if len(hints) <= FEW
        else ("\n  ", "\n(dsv3 adopt SCRIPT.sh translates a whole launch script)")
    )
    return text + mark + mark.join(f"{option}: {found}" for option, found in hints) + end
