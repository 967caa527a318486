"""What a proof found, as a folder: report.json, report.md, and lists of what was compared. No paths, no machines."""

import contextlib
import datetime
import getpass
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable
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
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }

    def public(self, private: dict[str, str] | None = None) -> dict[str, Any]:
        """`as_dict`, as JSON has it, without what `scrubbed` takes out; with the tables' SHA-256 by their files."""
        return self._public(private or {})[0]

    def _public(self, private: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        """Also the tables' files, by name."""
        clean = scrubbed(_plain(self.as_dict()), private) | {"word": self.word, "kind": self.kind}
        tables = {
            f"{name}.json": json.dumps(scrubbed(_plain(table), private), indent=1, ensure_ascii=False) + "\n"
            for name, table in self.tables.items()
        }
        return clean | {"sha256": {name: _sha256(text) for name, text in tables.items()}}, tables

    def write(self, folder: Path, private: dict[str, str] | None = None) -> dict[str, Any]:
        """Write the folder, whole or not at all; report.md is signed off with the SHA-256 of report.json.

        Args:
            private: words that must not be in it (paths), each with what stands for it.

        Returns:
            What report.json holds.

        Raises:
            RefusedArgument: it cannot be written.
        """
        clean, tables = self._public(private or {})
        whole = json.dumps(clean, indent=2, ensure_ascii=False) + "\n"
        files = tables | {
            "report.json": whole,
            "report.md": _markdown(clean) + _signed_off(clean, _sha256(whole)),
        }
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
                made = Path(unfinished) / "report"
                made.mkdir()
                for name, text in files.items():
                    (made / name).write_text(text, encoding="utf-8")
                os.replace(made, folder)  # an empty folder may be there
        except OSError as error:
            raise RefusedArgument(f"--output {folder}: {error.strerror or error}") from error
        return clean


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _signed_off(report: dict[str, Any], digest: str) -> str:
    """What `sha256sum` says of the folder's other files, so that a later change is seen."""
    sums = {"report.json": digest, **report["sha256"]}
    head = f"\n## Signed off\n\n**{report['word']}**, {report['date']}, dsv3 prove; SHA-256:\n\n"
    return head + "".join(f"    {value}  {name}\n" for name, value in sums.items())


def versions() -> dict[str, str]:
    """Of Python, the packages, the kernel's kind and the processor's."""
    found = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        found["dsv3_megatron"] = f"{found.get('dsv3_megatron', '')} of commit {commit}".strip()
    return found


def _commit() -> str:
    """Of the checkout this package is in, "-dirty" behind it where files differ; "" without one."""
    above = Path(__file__).parents[2]
    if not (above / ".git").exists():
        return ""
    words = ["git", "-C", str(above), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def new_folder(folder: Path) -> Path:
    """The folder of a report, to be made.

    Raises:
        RefusedArgument: it is there already, or cannot be made.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RefusedArgument(f"--output {folder}: is there already; remove it, or name another")
        above = next(place for place in folder.absolute().parents if place.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise RefusedArgument(f"--output {folder}: nothing can be written in {above}")
    except OSError as error:
        raise RefusedArgument(f"--output {folder}: {error.strerror}") from error
    return folder


# Of an address the credentials, and where it is no public place also the host and its path; a revision stays.
_ADDRESS = re.compile(r"(?P<scheme>\b[\w+.-]+://)(?P<place>[^\s'\"<>@]*(?:@[^\s'\"<>/@]*(?=/)[^\s'\"<>@]*)?)")
_PUBLIC = re.compile(r"(?:github\.com|gitlab\.com|bitbucket\.org|huggingface\.co|pypi\.org)(?:[/:]|$)")
_NAME = r"[\w.+@%=,~-]"  # a character of a name in a path
_QUOTED = re.compile(r"""(?P<quote>['"])(?:~[\w.-]*|\.{0,2})/[^'"\n]*(?P=quote)""")
_PATH = re.compile(rf"(?<![\w./<>~])(?:~[\w.-]*|\.{{0,2}})/{_NAME}+(?:/{_NAME}*)*")
_NUMBERED_HOST = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?(?![\w.])")


def scrubbed(value: Any, private: dict[str, str]) -> Any:
    """A JSON value without paths, user and machine: known ones by their stand-ins, others by `<path>`, `<host>`."""
    return _replaced(value, _replacements(private))


Replacement = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _replacements(private: dict[str, str]) -> list[Replacement]:
    """What is taken out, and what stands for it, in this order."""
    found: list[Replacement] = [
        (re.compile(rf"(?<![\w.-]){re.escape(place)}(?![\w-])"), private[place])
        for place in sorted(private, key=len, reverse=True)
        if len(place) > 1
    ]
    for place, stand_in in _own_places():  # with what lies below
        found.append((re.compile(rf"(?<![\w.-]){re.escape(place)}(?![\w-])(?:/{_NAME}*)*"), stand_in))
    found += [
        (_ADDRESS, _public_address),
        (_QUOTED, "'<path>'"),
        (_PATH, "<path>"),
        (_NUMBERED_HOST, "<host>"),
    ]
    for name, stand_in in _own_names():
        # A word of its own; a longer name also inside another (gpu-node17.cluster:29500, alice's runs/alice_2).
        own = re.escape(name) if len(name) > 4 else rf"(?<![\w.-]){re.escape(name)}(?![\w-])"
        found.append((re.compile(own), stand_in))
    return found


def _replaced(value: Any, replacements: list[Replacement]) -> Any:
    if isinstance(value, dict):
        return {_replaced(key, replacements): _replaced(item, replacements) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, replacements) for item in value]
    if not isinstance(value, str):
        return value
    for pattern, stand_in in replacements:
        value = pattern.sub(stand_in, value)
    return value


def _public_address(found: re.Match[str]) -> str:
    *_, place = (
        found["place"].rpartition("@") if "@" in found["place"].split("/")[0] else ("", found["place"])
    )
    if found["scheme"].endswith("file://"):
        return f"{found['scheme']}<path>"
    return found["scheme"] + (place if _PUBLIC.match(place) else "<host>")


def _own_places() -> list[tuple[str, str]]:
    """Where this process is and its user at home, each as it is and as links resolve it."""
    home, here = os.path.expanduser("~"), os.getcwd()
    places = [
        (here, "<cwd>"),
        (os.path.realpath(here), "<cwd>"),
        (home, "<home>"),
        (os.path.realpath(home), "<home>"),
    ]
    return [(place, stand_in) for place, stand_in in places if len(place) > 1]


def _own_names() -> list[tuple[str, str]]:
    """Names of this machine and of the user, the longest first."""
    machines = {
        name for full in (socket.gethostname(), platform.node()) for name in (full, full.partition(".")[0])
    }
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")}
    users.add(os.path.basename(os.path.expanduser("~")))
    with contextlib.suppress(Exception):  # a user without a name
        users.add(getpass.getuser())
    names = [(name, "<machine>") for name in machines] + [(name, "<user>") for name in users - machines]
    return sorted(
        ((name, stand_in) for name, stand_in in names if len(name) > 1), key=lambda pair: -len(pair[0])
    )


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
