"""`dsv3 card --report FILE`: what a report of the GPU tests found, as rows of the verification card.

    dsv3 card --report gpu_bundle/report/report.json

writes docs/verification.toml and docs/support.md. A stage has one row, "First GPU hour, stage N: …", whose status
names the GPU; a rehearsal on CPU has rows of its own. Reports of other sources than these are refused.
"""

import datetime
import hashlib
import importlib.metadata
import json
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.arguments import support
from dsv3_megatron.errors import Parser, RefusedArgument, exits_cleanly

FORMAT = 1
RESULTS = ("passed", "failed", "skipped", "killed at its limit")
# What a report holds: a type, {name: shape} for a dict that must have these names, a pair of types for a dict with any
# names, a list of one shape.
TEST: dict[str, Any] = {"test": str, "result": str, "figures": dict}
STEP: dict[str, Any] = {
    "stage": str,
    "result": str,
    "counts": (str, int),
    "figures": (str, str),
    "seconds": float,
    "date": str,
    "command": str,
    "tests": [TEST],
}
REPORT: dict[str, Any] = {
    "format": int,
    "version": str,
    "source": str,
    "device": str,
    "machine": dict,
    "stages": (str, {"title": str, "steps": [str]}),
    "steps": (str, STEP),
}
CPU = "CPU"


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Enter a report; 0 when its rows are on the card."""
    parser = Parser(prog="dsv3 card", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--report", type=Path, required=True, help="report.json of the GPU tests")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of verification.toml")
    options = parser.parse_args(argv)
    card = options.docs / "verification.toml"
    if not card.is_file():
        raise RefusedArgument(
            f"--docs {options.docs}: there is no verification.toml; use the folder docs of a checkout"
        )
    report = read(options.report)
    rows = rows_of(report)
    card.write_text(entered(card.read_text(), rows))
    (options.docs / "support.md").write_text(support.render(support.load_cards(options.docs)))
    for row in rows:
        print(f"{row['feature']}: {row['status']}: {row['figure']}")
    return 0


def source() -> str:
    """A hash of the package's modules: which sources a report is about."""
    folder = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def read(path: Path) -> dict[str, Any]:
    """A report.

    Raises:
        RefusedArgument: it is none, lacks something, or is about other sources than these.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RefusedArgument(
            f"--report {path}: not readable as JSON ({error}); use report.json of a GPU run"
        ) from None
    if not isinstance(report, dict) or "format" not in report:
        raise RefusedArgument(f"--report {path}: holds no report; use report.json of a GPU run")
    here = {"format": FORMAT, "version": importlib.metadata.version("dsv3_megatron"), "source": source()}
    wrong = [] if report["format"] != FORMAT else list(_wrong(report, REPORT, "")) or list(_unlike(report))
    if wrong:
        raise RefusedArgument(
            f"--report {path}: {', '.join(wrong[:5])}{' and more' if len(wrong) > 5 else ''}; run the stage "
            "again for a whole report"
        )
    for field, value in here.items():
        if report[field] != value:
            raise RefusedArgument(
                f"--report {path}: its {field} is {report[field]!r}, that of this checkout {value!r}; check out what "
                "was run, or run the stages again"
            )
    if not report["steps"]:
        raise RefusedArgument(f"--report {path}: no step was run; run a stage first")
    return report


def _wrong(value: Any, shape: Any, name: str) -> Iterator[str]:
    """What of `value` has not the shape that a report has (see `TEST`), by name."""
    if isinstance(shape, type):
        numbers = (int, float) if shape is float else shape
        if not isinstance(value, numbers) or (isinstance(value, bool) and shape is not bool):
            yield f"{name} is {_short(value)}, no {shape.__name__}"
        elif shape is str and "\n" in str(value):
            yield f"{name} has several lines"
        elif shape is str and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in str(value)):
            yield f"{name} is {_short(value)}, with characters that cannot be written"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{name} is {_short(value)}, no list"
            return
        for i, one in enumerate(value):
            yield from _wrong(one, shape[0], f"{name}[{i}]")
    elif not isinstance(value, dict):
        yield f"{name} is {_short(value)}, no dict"
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key in value:
                yield from _wrong(value[key], inner, f"{name}.{key}".lstrip("."))
            else:
                yield f"it lacks {name}.{key}".replace(" .", " ")
    else:
        for key, one in value.items():
            yield from _wrong(one, shape[1], f"{name}.{key}")


def _unlike(report: Mapping[str, Any]) -> Iterator[str]:
    """What of a report of the right shape contradicts itself."""
    if not report["device"].strip():
        yield "device is empty"
    known = {step: stage for stage, told in report["stages"].items() for step in told["steps"]}
    for name, step in report["steps"].items():
        if known.get(name) != step["stage"]:
            yield f"steps.{name} is no step of stages.{step['stage']}"
        if step["result"] not in RESULTS:
            yield f"steps.{name}.result is {_short(step['result'])}, none of {', '.join(RESULTS)}"
        if step["counts"] != Counter(test["result"] for test in step["tests"]):
            yield f"steps.{name}.counts are not those of its tests"
        if step["result"] == "passed" and not set(step["counts"]) <= {"passed", "skipped"}:
            yield f"steps.{name} has passed, but not all of its tests have"
        if step["result"] == "passed" and "passed" not in step["counts"]:
            yield f"steps.{name} has passed, but none of its tests has"
        try:
            datetime.date.fromisoformat(step["date"])
        except ValueError:
            yield f"steps.{name}.date is {_short(step['date'])}, no date"


def _short(value: Any) -> str:
    return textwrap.shorten(json.dumps(value), 40)


def rows_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of the card for each stage of which something was run."""
    rehearsal = report["device"] == CPU
    rows = []
    for number, stage in report["stages"].items():
        steps = {name: report["steps"].get(name) for name in stage["steps"]}
        run = [step for step in steps.values() if step is not None]
        if not run:
            continue
        if all(step["result"] == "skipped" for step in run):
            status = "not run"
        else:
            status = "run on CPU" if rehearsal else f"run on {report['device']}"
        rows.append(
            {
                "feature": feature(number, stage["title"], rehearsal),
                "status": status,
                "command": run[0]["command"],
                "figure": "; ".join(_said(name, step) for name, step in steps.items()),
                "date": max(step["date"] for step in run),
                "source": report["source"],
            }
        )
    return rows


def feature(number: str, title: str, rehearsal: bool) -> str:
    """First column of a stage's row; of stage "gpus", that needs several."""
    where = f"First GPU hour, stage {number}" if number.isdigit() else "GPU tests"
    return f"{where}{', rehearsed with stand-ins' if rehearsal else ''}: {title}"


def _said(name: str, step: Mapping[str, Any] | None) -> str:
    """A step in the figure's column: everything that did not pass, and what was measured."""
    if step is None:
        return f"{name}: not run"
    counts = ", ".join(f"{count} {result}" for result, count in step["counts"].items())
    state = "" if step["result"] in ("passed", "skipped") else f" {step['result']},"
    figures = ", ".join(f"{figure} {value}" for figure, value in step["figures"].items())
    return f"{name}:{state} {counts or 'no test'}{f' ({figures})' if figures else ''}"


def entered(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The card's text with `rows` in the place of those of the same feature, or at its end."""
    head, *blocks = re.split(r"(?m)^\[\[card\]\]\n", text)
    for row in rows:
        key = f"feature = {_quoted(row['feature'])}\n"
        block = key + "".join(
            f"{name} = {_quoted(row[name]) if name != 'date' else _date(row[name])}\n"
            for name in ("status", "command", "figure", "date", "source")
        )
        places = [i for i, old in enumerate(blocks) if old.startswith(key)]
        if places:
            blocks[places[0]] = block + "\n"
        else:
            blocks[-1:] = [blocks[-1].rstrip("\n") + "\n\n"] if blocks else []
            blocks.append(block)
    return (head + "".join("[[card]]\n" + block for block in blocks)).rstrip("\n") + "\n"


def _quoted(text: str) -> str:
    """A basic string of TOML, in which JSON's escapes mean the same."""
    return json.dumps(text, ensure_ascii=False)


def _date(text: str) -> str:
    return datetime.date.fromisoformat(text).isoformat()


if __name__ == "__main__":
    raise SystemExit(main())
