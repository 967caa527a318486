"""Launch lines × machines through the check, in a process that stands for a GPU job's.

stdin, per line: {"line": [words], "machines": [{NAME: VALUE}], "build": bool}; stdout: a list of findings per machine.
"""

import contextlib
import json
import sys
from dataclasses import replace

from dsv3_megatron.preflight.findings import ok
from dsv3_megatron.preflight.line import read
from dsv3_megatron.preflight.machine import Machine
from dsv3_megatron.preflight.start import become


def main() -> None:
    become(Machine())
    from dsv3_megatron.preflight.check import examine

    for text in sys.stdin:
        task = json.loads(text)
        line, answers = read(task["line"]), []
        built = not task["build"]
        for said in task["machines"]:
            machine = replace(Machine.of(said), env={"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
            become(machine)
            with contextlib.redirect_stdout(sys.stderr):  # what Megatron says while it builds is no answer
                found = examine(line, machine, build=not built)
            built = built or ok(found)  # the modules are the same on each
            answers.append([finding.as_dict() for finding in found])
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
