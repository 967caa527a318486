"""What a check has to say, one line each."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dsv3_megatron.errors import told

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        severity: "error": the job would not start, or not do what it says; "warning": slower or larger than it need
            be, or likely a mistake; "info": what was assumed, or could not be checked here.
        argument: the option, variable or package that it is about.
        why, use: the reason, and what to give in its place ("" where nothing has to be done).
    """

    severity: Severity
    argument: str
    why: str
    use: str = ""

    def __str__(self) -> str:
        advice = f" Use {self.use}." if self.use else ""
        return f"{self.severity}: {self.argument}: {self.why.rstrip('.?')}.{advice}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


# The form of our messages: "argument value: why. Use this."
_FORM = re.compile(
    r"^(?:argument )?(?P<argument>.+?): (?P<why>.+?)"
    r"(?:[.;] (?:[Uu]se|did you mean|Available:) (?P<use>.+?))?\??\.?$",
    re.DOTALL,
)
_OPTION = re.compile(r"--[a-z0-9][a-z0-9-]+")


def from_message(text: str, severity: Severity = "error") -> list[Finding]:
    """The findings in the text of a `RefusedArgument`: one per line that names an argument."""
    return [_from_line(line, severity) for line in text.splitlines() if line.strip()]


def from_megatron(error: BaseException) -> Finding:
    """What Megatron's own validation, or the construction of a module, stopped with."""
    text = " ".join(told(error).split())
    attribute = re.search(r"\bargs\.([a-z0-9_]+)", text)
    option = f"--{attribute[1].replace('_', '-')}" if attribute else "Megatron"
    named = _OPTION.search(text)
    why, _, use = text.partition(". Use ")
    return Finding("error", named[0] if named else option, why.rstrip("."), use.rstrip("."))


_UNKNOWN = re.compile(r"^unrecognized arguments: (?P<words>[^;]+)(?:; did you mean (?P<near>.+?)\??)?$")


def _from_line(line: str, severity: Severity) -> Finding:
    line, of_parser = re.subn(r" \(all options: --help\)$", "", line.strip())
    unknown = _UNKNOWN.match(line)
    if unknown is not None:
        return Finding(
            severity, unknown["words"], "no such argument", unknown["near"] or "--help, which lists all"
        )
    match = _FORM.match(line)
    advice = "what --help says of it" if of_parser else ""
    if match is None:
        named = _OPTION.search(line)
        return Finding(severity, named[0] if named else "launch line", line.rstrip("."), advice)
    use = re.sub(r"^'(.+?)'\? Available:", r"\1, or another of", match["use"] or advice)
    return Finding(severity, match["argument"], match["why"], use.strip("'"))


def ok(findings: Iterable[Finding]) -> bool:
    """Whether the job may start: no error among them."""
    return all(finding.severity != "error" for finding in findings)
