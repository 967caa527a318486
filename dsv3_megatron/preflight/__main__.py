"""`dsv3 preflight [NAME=VALUE ...] LAUNCH LINE`: would this job start, and would it run as it should?"""

import contextlib
import json
import sys
from collections.abc import Sequence

from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.preflight import findings
from dsv3_megatron.preflight.findings import Finding
from dsv3_megatron.preflight.line import read
from dsv3_megatron.preflight.machine import USAGE, Machine

OUTPUTS = ("text", "json")


def usage() -> str:
    """What can be said."""
    lines = [
        "usage: dsv3 preflight [NAME=VALUE ...] LAUNCH LINE [output=json]",
        "",
        "Checks a GPU job's launch line without its GPUs; exit status 0 when it may start, 1 when not, 2 for a line",
        "that cannot be read. LAUNCH LINE: torchrun … -m dsv3_megatron.train …,",
        "… -m dsv3_megatron.train_hydra model=… layout=…, … pretrain_gpt.py --spec dsv3 …, or arguments or overrides",
        "alone. NAME=VALUE says what the job will run on:",
        *(f"  {name:14} {what}" for name, what in USAGE.items()),
    ]
    return "\n".join(lines)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; 0 when none is an error, else 1.

    Raises:
        RefusedArgument: the line or a NAME=VALUE cannot be read.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    said, line_words = _split(words)
    output = said.pop("output", ["text"])[-1]
    if output not in OUTPUTS:
        raise RefusedArgument(f"output={output}: no such form. Use output=text or output=json")
    try:
        for name, values in said.items():
            if len(set(values)) > 1:
                raise RefusedArgument(f"{name}={values[1]}: beside {name}={values[0]}. Use one of them")
        machine, line = Machine.of({name: values[0] for name, values in said.items()}), read(line_words)
    except RefusedArgument as error:
        if output == "json":
            _print(findings.from_message(str(error)), output)
            return 2
        raise
    from dsv3_megatron.preflight.start import become

    become(machine)
    from dsv3_megatron.preflight.check import examine

    with contextlib.redirect_stdout(
        sys.stderr
    ):  # what options and Megatron say on the way: stdout is the findings'
        found = examine(line, machine)
    _print(found, output)
    return 0 if findings.ok(found) else 1


def _split(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Our own NAME=VALUE, wherever they stand (no argument of Megatron and no group of ours has such a name), and the
    rest.
    """
    said: dict[str, list[str]] = {}
    line: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and (name in USAGE or name == "output"):
            said.setdefault(name, []).append(value)
        elif line or word != "--":
            line.append(word)
    return said, line


def _print(found: Sequence[Finding], output: str) -> None:
    fine = findings.ok(found)
    if output == "json":
        print(json.dumps({"ok": fine, "findings": [finding.as_dict() for finding in found]}))
        return
    for finding in found:
        print(finding)
    print("ready: the job may start" if fine else "not ready: see the errors")


if __name__ == "__main__":
    raise SystemExit(main())
