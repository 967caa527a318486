"""`dsv3 card --report FILE`: what a report of the GPU tests found, as rows of the verification card.

    dsv3 card --report gpu_bundle/report/report.json

writes docs/verification.toml and docs/support.md. A stage has one row, "First GPU hour, stage N: …", whose status
names the GPU; a rehearsal on CPU has rows of its own. Reports of other sources than these are refused.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.arguments import support
from dsv3_megatron.errors import RefusedArgument, exits_cleanly

FORMAT = 1
FIELDS = ("format", "version", "source", "device", "machine", "stages", "steps")
STEP_FIELDS = ("stage", "result", "counts", "figures", "seconds", "date", "command", "tests")
CPU = "CPU"


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Enter a report; 0 when its rows are on the card."""
    parser = argparse.ArgumentParser(prog="dsv3 card", description=(__doc__ or "").split("\n")[0])
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
    except (OSError, ValueError) as error:
        raise RefusedArgument(
            f"--report {path}: not readable as JSON ({error}); use report.json of a GPU run"
        ) from None
    if not isinstance(report, dict):
        raise RefusedArgument(f"--report {path}: holds no report; use report.json of a GPU run")
    missing = [field for field in FIELDS if field not in report]
    if not missing and report["format"] == FORMAT:
        missing = [
            f"steps.{name}.{field}"
            for name, step in report["steps"].items()
            for field in STEP_FIELDS
            if field not in step
        ]
        missing += [
            f"stages.{step['stage']}" for step in report["steps"].values() if not _known(report, step)
        ]
    if missing:
        raise RefusedArgument(
            f"--report {path}: lacks {', '.join(missing)}; run the stage again for a whole report"
        )
    here = {"format": FORMAT, "version": importlib.metadata.version("dsv3_megatron"), "source": source()}
    for field, value in here.items():
        if report[field] != value:
            raise RefusedArgument(
                f"--report {path}: its {field} is {report[field]}, that of this checkout {value}; check out what was "
                "run, or run the stages again"
            )
    if not report["steps"]:
        raise RefusedArgument(f"--report {path}: no step was run; run a stage first")
    return report


def _known(report: Mapping[str, Any], step: Mapping[str, Any]) -> bool:
    return step.get("stage") is None or step["stage"] in report["stages"]


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
