"""Writes docs/support.md: settings, refusals, and the verification card (docs/verification.toml).

    python -m dsv3_megatron.arguments.support docs

A test compares the file with what this writes.
"""

import argparse
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.arguments.refusals import REFUSALS, Refusal
from dsv3_megatron.arguments.requirements import USES
from dsv3_megatron.arguments.setting import Setting
from dsv3_megatron.arguments.settings import SETTINGS
from dsv3_megatron.arguments.surroundings import SUPPORTED_MEGATRON

STATUSES = ("run on GPU", "run on CPU", "constructed with TE", "compiled", "not run")
_ON_A_GPU = "run on "  # with the GPU's name: only `dsv3 card` writes it, with the sources that were run

HEAD = f"""# What is supported, and how it was checked

Written by `python -m dsv3_megatron.arguments.support docs` from the tables that the code uses; do not edit.
How to start a run is in [ways_in.md](ways_in.md).

Supported: megatron-core ≥ {SUPPORTED_MEGATRON[0]}, < {SUPPORTED_MEGATRON[1]}; Python ≥ 3.12; and of what lies below,
by what is used of it:
"""


def render(cards: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    parts = [HEAD, _uses(), _card_section(cards), _refusal_section(), _settings_section()]
    return "\n".join(parts)


def _uses() -> str:
    """Packages and libraries with the oldest version that is supported, and everything that is used of them."""
    rows = [
        (use.package, f"≥ {use.since}", use.what, use.by or "every run", "yes" if use.required else "")
        for use in USES
    ]
    return _table(("package", "since", "what is used", "by", "bounds what is supported"), rows)


def _card_section(cards: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (card["feature"], card["status"], _code(card["command"]), card["figure"], str(card["date"]))
        for card in cards
    ]
    text = "One row per feature and kind of check; *not run* means exactly that.\n"
    return (
        f"## Verification card\n\n{text}\n{_table(('feature', 'status', 'command', 'figure', 'date'), rows)}"
    )


def _refusal_section() -> str:
    text = (
        "## Refused\n\nEach row is an error that names the argument, the value and what to use, and has a "
        "test with the\nexample. `‹name›` stands for the value of that argument.\n"
    )
    features: dict[str, list[Refusal]] = {}
    for row in REFUSALS:
        features.setdefault(row.feature, []).append(row)
    for feature, refusals in features.items():
        rows = [(_code(r.argument), _plain(r.reason), _plain(r.use), _code(r.example)) for r in refusals]
        text += f"\n### {feature}\n\n{_table(('argument', 'why', 'use', 'example'), rows)}"
    return text


def _settings_section() -> str:
    text = (
        "## Settings\n\n*size* and *run*: filled in when not given, any value is accepted. *fixed*: another "
        "value is refused.\n*recipe*: refused unless `--allow-deviation NAME` says that it is meant.\n\n"
    )
    rows = [(_code(s.flag or s.dest), _value(s), s.kind, s.source) for s in SETTINGS]
    return text + _table(("option", "DeepSeek-V3", "kind", "source"), rows)


def _value(setting: Setting) -> str:
    value = setting.value_for(argparse.Namespace())
    words = {True: "on", False: "off", None: "none"}
    shown = words[value] if isinstance(value, bool | None) else str(value)
    if callable(setting.value):
        shown = "depends on the others" if "object" in shown else f"{shown}, depending on the others"
    return " or ".join([shown, *(str(other) for other in setting.also)])


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(head)} |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _plain(template: str) -> str:
    return re.sub(r"\{(\w+)\}", r"‹\1›", template)


def load_cards(folder: Path) -> list[dict[str, Any]]:
    """The verification card; raises ValueError for a status that is not one of `STATUSES`."""
    cards = tomllib.loads((folder / "verification.toml").read_text())["card"]
    for card in cards:
        on_a_gpu = card["status"].startswith(_ON_A_GPU) and bool(card.get("source"))
        if card["status"] not in STATUSES and not on_a_gpu:
            raise ValueError(
                f"verification.toml: {card['feature']}: status {card['status']!r} is none of {STATUSES}"
            )
    return cards


def main(argv: Sequence[str] | None = None) -> None:
    """Write FOLDER/support.md."""
    parser = argparse.ArgumentParser(prog="dsv3_megatron.arguments.support")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    (folder / "support.md").write_text(render(load_cards(folder)))


if __name__ == "__main__":
    main()
