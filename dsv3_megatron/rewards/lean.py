"""Proofs that Lean checks, through its command line, in the sandbox; nothing of Lean is installed by this package.

`lean` is looked for on PATH, or at DSV3_LEAN (a toolchain's `bin/lean`); with DSV3_LEAN_PROJECT, a built Lake
project (one with Mathlib, for example), it is started with the project's libraries.
"""

import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.rewards.extract import tagged, without_thoughts
from dsv3_megatron.rewards.sandbox import Limits, run_command

__all__ = ["CHECKS", "lean"]

# What Lean's own logic stands on; sorry would be sorryAx, native_decide a compiler's word.
AXIOMS = {"propext", "Classical.choice", "Quot.sound"}
# Unproved ends, other axioms, and commands: what elaborates code could print a verdict of its own.
_FORBIDDEN = re.compile(
    r"#[a-z]|\b(sorry|admit|axiom|unsafe|implemented_by|extern|native_decide|run_cmd|run_tac|run_elab|by_elab|elab|"
    r"elab_rules|macro|macro_rules|syntax|notation|initialize|import|namespace|end|IO|set_option)\b"
)
TOOLS: tuple[str, ...] = ()  # further folders that the command may read and run
_FENCE = re.compile(r"```(?:lean4?)?[ \t]*\n(.*?)```", re.DOTALL)
_NAME = re.compile(r"\s*(?:theorem|lemma)\s+([\w.']+)")
LIMITS = Limits(seconds=60.0, memory_mib=8192, output_bytes=1 << 20, disk_mib=16)


def lean(prompt: str, response: str, answer: Any) -> float:
    """1.0 where Lean accepts the theorem with the response's proof and it rests on Lean's three axioms only.

    The proof, what follows `:= by` or `:=` of the statement, is the last fenced block, or the whole, of `<answer>`
    or of what follows the thoughts. The theorem stands in a namespace of its own and is restated after the proof, so
    that a response that ends it and proves another gains nothing.

    Args:
        answer: {"statement": "theorem name … : …" without its proof, optional "header": imports and opens}.

    Raises:
        ValueError: the answer is not of this form.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("statement"), str):
        raise ValueError('the answer must be {"statement": "theorem name … : …", "header": "import …"}')
    name = _NAME.match(answer["statement"])
    if name is None:
        raise ValueError('"statement" must begin with theorem or lemma and a name')
    proof = _proof(response)
    if not proof.strip() or _FORBIDDEN.search(proof):
        return 0.0
    statement = answer["statement"].rstrip().removesuffix(":= by").removesuffix(":=").rstrip()
    own = name[1]
    mark = f"dsv3_{secrets.token_hex(8)}"  # no output of the proof's own can name it
    restated = f"theorem {mark}" + statement[name.end() :]
    source = (
        f"{answer.get('header', '')}\n\nnamespace DSV3Given\n{statement} := {proof}\nend DSV3Given\n\n"
        f"{restated} := by\n  first | exact DSV3Given.{own} | (intros; apply DSV3Given.{own} <;> assumption)\n"
        f"#print axioms {mark}\n"
    )
    program = _program()
    if program is None:
        raise RefusedArgument(_MISSING)
    toolchain = Path(program).resolve().parent.parent
    command, readable = [program], [str(toolchain), *TOOLS]
    if project := os.environ.get("DSV3_LEAN_PROJECT"):
        libraries = sorted(
            str(path) for path in Path(project).glob(".lake/**/build/lib/lean") if path.is_dir()
        )
        command = ["/usr/bin/env", f"LEAN_PATH={os.pathsep.join(libraries)}", program]
        readable += [project, "/usr/bin/env"]
    result = run_command([*command, "Proof.lean"], {"Proof.lean": source}, readable, LIMITS)
    return float(result.outcome == "exited" and result.detail == "0" and _axioms_hold(result.stdout, mark))


def _proof(response: str) -> str:
    text = tagged(response)
    text = without_thoughts(response) if text is None else text
    blocks = _FENCE.findall(text)
    text = blocks[-1] if blocks else text
    body = text.strip("\n")
    first = body.lstrip()
    if first.startswith(":="):
        return first[2:]
    return body if first.startswith("by") else "by\n" + "\n".join("  " + line for line in body.splitlines())


def _axioms_hold(output: str, mark: str) -> bool:
    """Whether the last word on the restated theorem names no other axioms."""
    lines = [line for line in output.splitlines() if f"'{mark}'" in line]
    if not lines or "error" in output or "declaration uses 'sorry'" in output:
        return False
    if "does not depend on any axioms" in lines[-1]:
        return True
    listed = re.search(r"depends on axioms: \[(.*)\]", output[output.rindex(f"'{mark}'") :], re.DOTALL)
    return listed is not None and {one.strip() for one in listed[1].split(",")} <= AXIOMS


_MISSING = "reward 'lean' needs Lean 4: install a toolchain and put lean on PATH, or its path into DSV3_LEAN"


def _program() -> str | None:
    given = os.environ.get("DSV3_LEAN")
    return given if given and Path(given).is_file() else shutil.which("lean")


def _check_program() -> None:
    if _program() is None:
        raise RefusedArgument(_MISSING)


CHECKS = {"lean": _check_program}
