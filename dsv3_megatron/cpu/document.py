"""Writes the tables of docs/cpu.md: `python -m dsv3_megatron.cpu.document`."""

from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "cpu.md"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _between(text: str, name: str, table: str) -> str:
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{PAGE}: no {start.strip()} ... {end}")
    return before + start + "\n" + table + "\n" + end + after


def page() -> str:
    """docs/cpu.md with its tables as the code has them."""
    from dsv3_megatron.cpu.refusals import REFUSALS
    from dsv3_megatron.cpu.replacements import TABLE

    text = PAGE.read_text()
    # One row per owner and reason, in the order of the table.
    replaced: dict[tuple[str, str], list[str]] = {}
    for row in TABLE:
        replaced.setdefault((row.owner, row.why), []).extend(row.names)
    rows = [
        (f"`{owner}`", ", ".join(f"`{name}`" for name in names), why)
        for (owner, why), names in replaced.items()
    ]
    text = _between(text, "replacements", _table(("in", "replaced", "why"), rows))
    refused = [(f"`{row.flag}`", row.why, row.fix) for row in REFUSALS]
    return _between(text, "refusals", _table(("argument", "needs", "use"), refused))


if __name__ == "__main__":
    PAGE.write_text(page())
