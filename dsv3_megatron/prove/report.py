"""What a proof found, as a folder: report.json, report.md, and lists of what was compared. No paths, no machines."""

import importlib.metadata
import json
import math
import os
import platform
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv3_megatron.errors import RefusedArgument

__all__ = ["Check", "Report", "Word", "new_folder", "scrubbed"]

Word = Literal["proved", "refuted", "incomplete"]
PACKAGES = ("dsv3_megatron", "megatron-core", "torch", "transformers", "safetensors", "numpy", "triton")


@dataclass
class Check:
    """One comparison.

    Attributes:
        name: what it is about.
        compared: the two sides, and of how much.
        how: the measure and its bound, in words.
        holds: None where it was not done.
        count: things compared.
        worst: the largest value of the measure, None where there is no number.
        detail: where it failed, or why it was not done.
    """

    name: str
    compared: str
    how: str
    holds: bool | None
    count: int = 0
    worst: float | None = None
    detail: str = ""


@dataclass
class Report:
    """A proof: its checks, and what they leave open.

    Attributes:
        kind: "checkpoint", "resume", "layout", "commit" or "fp8".
        statement: what is to be proved, in a sentence.
        checks: in the order in which they were done.
        not_covered: what a reader must not conclude.
        settings: what the proof depends on (words of the line, positions, rule of shrinking, …).
        tables: further files of the folder by name without .json, JSON values.
    """

    kind: str
    statement: str
    checks: list[Check] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)

    @property
    def word(self) -> Word:
        """refuted: a check failed; incomplete: one was not done, or there was none; else proved."""
        if any(check.holds is False for check in self.checks):
            return "refuted"
        done = self.checks and all(check.holds for check in self.checks)
        return "proved" if done else "incomplete"

    def as_dict(self) -> dict[str, Any]:
        """Contents of report.json."""
        return {
            "word": self.word,
            "kind": self.kind,
            "statement": self.statement,
            "checks": [vars(check) for check in self.checks],
            "not_covered": self.not_covered,
            "settings": self.settings,
            "versions": versions(),
        }

    def public(self, private: dict[str, str] | None = None) -> dict[str, Any]:
        """`as_dict`, as JSON has it, without what `scrubbed` takes out."""
        return scrubbed(_plain(self.as_dict()), private or {})

    def write(self, folder: Path, private: dict[str, str] | None = None) -> None:
        """Write the folder.

        Args:
            private: words that must not be in it (paths), each with what stands for it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        clean = self.public(private)
        (folder / "report.json").write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n")
        (folder / "report.md").write_text(_markdown(clean))
        for name, table in self.tables.items():
            text = json.dumps(scrubbed(_plain(table), private or {}), indent=1, ensure_ascii=False)
            (folder / f"{name}.json").write_text(text + "\n")


def versions() -> dict[str, str]:
    """Of Python, the packages, the kernel's kind and the processor's."""
    found = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def new_folder(folder: Path) -> Path:
    """The folder of a report, to be made.

    Raises:
        RefusedArgument: it is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RefusedArgument(f"--output {folder}: is there already; remove it, or name another")
    return folder


_PATH = re.compile(r"(?<![\w./:<])/(?:[\w.+@-]+/)+[\w.+@-]*")


def scrubbed(value: Any, private: dict[str, str]) -> Any:
    """A JSON value without paths, user and machine: known ones by their stand-ins, others by `<path>`."""
    if isinstance(value, dict):
        return {scrubbed(key, private): scrubbed(item, private) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(item, private) for item in value]
    if not isinstance(value, str):
        return value
    for secret in sorted(private, key=len, reverse=True):
        if secret:
            value = value.replace(secret, private[secret])
    value = _PATH.sub("<path>", value)
    for name in {socket.gethostname(), platform.node()}:
        if len(name) > 3:  # shorter ones are words
            value = value.replace(name, "<machine>")
    home = os.path.expanduser("~")
    return value.replace(home, "<home>") if len(home) > 1 else value


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(report: dict[str, Any]) -> str:
    marks = {True: "holds", False: "**fails**", None: "not done"}
    lines = [f"# {report['kind']}: {report['word']}", "", report["statement"], "", "## Compared", ""]
    lines += ["| check | sides | how | number | worst | result |", "|---|---|---|---|---|---|"]
    for check in report["checks"]:
        worst = "" if check["worst"] is None else f"{check['worst']:.3g}" if isinstance(check["worst"], float) else (
            str(check["worst"])
        )  # fmt: skip
        cells = [check["name"], check["compared"], check["how"], check["count"], worst, marks[check["holds"]]]
        lines.append(
            "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        )
    details = [f"- {check['name']}: {check['detail']}" for check in report["checks"] if check["detail"]]
    if details:
        lines += ["", "## Details", "", *details]
    lines += ["", "## Not covered", "", *(f"- {text}" for text in report["not_covered"])]
    lines += ["", "## Settings", "", *(f"- {name}: `{value}`" for name, value in report["settings"].items())]
    lines += ["", "## Versions", "", *(f"- {name} {value}" for name, value in report["versions"].items())]
    return "\n".join(lines) + "\n"
