"""Proofs whose steps z3 checks (extra `rewards`): the prover's reward where no Lean is.

A problem declares constants and functions, assumes, and asks for a goal, in SMT-LIB. The response is a list of
formulas, one after the other; each must follow from the assumptions and the steps before it by what z3 finds within
a small, fixed amount of work, and the last one is the goal. "Unknown" is not proved. So a hard goal needs its
lemmas, and an easy one is proved by stating it.
"""

import importlib.util
import re
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.rewards.extract import tagged, without_thoughts

__all__ = ["CHECKS", "smt", "steps_of"]

WORK = 200_000  # z3's resource units for a step: some ten milliseconds, the same on every machine
MAX_STEPS, MAX_CHARACTERS = 100, 20_000
_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


def smt(prompt: str, response: str, answer: Any) -> float:
    """1.0 where every step follows and the last is the goal, else 0.0.

    The steps are in the last fenced block, or are the whole text, of `<answer>` or of what follows the thoughts.

    Args:
        answer: {"declare": SMT-LIB commands (declare-const, declare-fun, define-fun, …), "assume": [formulas], "goal":
            formula, optional "work": z3's resource units for a step}.

    Raises:
        ValueError: the problem is not of this form, not SMT-LIB, or its assumptions contradict each other (anything
        follows).
    """
    import z3

    declare, assume, goal, work = _problem(answer)
    try:
        premises = [_formula(declare, text) for text in assume]
        wanted = _formula(declare, goal)
    except (z3.Z3Exception, ValueError) as error:
        raise ValueError(f"the problem is not SMT-LIB: {error}") from error
    if _verdict(premises, work) == z3.unsat:
        raise ValueError("the assumptions contradict each other")
    steps = steps_of(response)
    if not steps:
        return 0.0
    for text in steps:
        try:
            step = _formula(declare, text)
        except (z3.Z3Exception, ValueError):
            return 0.0
        if _verdict([*premises, z3.Not(step)], work) != z3.unsat:
            return 0.0
        premises.append(step)
    return float(premises[-1].eq(wanted))


def steps_of(response: str) -> list[str]:
    """The s-expressions of a response; none where a parenthesis, or the length, is wrong."""
    text = tagged(response)
    text = without_thoughts(response) if text is None else text
    blocks = _FENCE.findall(text)
    text = blocks[-1] if blocks else text
    # Quoted symbols, strings and comments could hide a parenthesis: a proof needs none.
    if len(text) > MAX_CHARACTERS or re.search(r'[|";]', text):
        return []
    steps: list[str] = []
    depth = begin = 0
    for place, sign in enumerate(text):
        if sign == "(":
            begin = place if depth == 0 else begin
            depth += 1
        elif sign == ")":
            depth -= 1
            if depth < 0:
                return []
            if depth == 0:
                steps.append(text[begin : place + 1])
        elif depth == 0 and not sign.isspace():
            return []  # words between the steps
    return steps if depth == 0 and len(steps) <= MAX_STEPS else []


def _formula(declare: str, text: str) -> Any:
    import z3

    if text.strip().startswith("(") and len(steps_of(text)) != 1:
        raise ValueError(f"not one formula: {text!r}")
    if not text.strip().startswith("(") and not re.fullmatch(r"\s*[\w.!?<>=+*/-]+\s*", text):
        raise ValueError(f"not one formula: {text!r}")
    found = z3.parse_smt2_string(f"{declare}\n(assert {text})")
    if len(found) != 1:
        raise ValueError(f"not one formula: {text!r}")
    return found[0]


def _verdict(formulas: list[Any], work: int) -> Any:
    import z3

    solver = z3.Solver()
    solver.set("rlimit", work)
    solver.add(*formulas)
    return solver.check()


def _problem(answer: Any) -> tuple[str, list[str], str, int]:
    if not isinstance(answer, dict) or not isinstance(answer.get("goal"), str):
        raise ValueError('the answer must be {"declare": SMT-LIB, "assume": [formulas], "goal": formula}')
    if unknown := answer.keys() - {"declare", "assume", "goal", "work"}:
        raise ValueError(f"the answer has an unknown key {sorted(unknown)[0]!r}")
    declare, assume, work = answer.get("declare", ""), answer.get("assume", []), answer.get("work", WORK)
    if not isinstance(declare, str) or "assert" in declare:
        raise ValueError('"declare" must be SMT-LIB declarations; assertions go into "assume"')
    if not isinstance(assume, list) or not all(isinstance(one, str) for one in assume):
        raise ValueError('"assume" must be a list of formulas')
    if isinstance(work, bool) or not isinstance(work, int) or work < 1:
        raise ValueError('"work" must be a whole number above 0')
    return declare, assume, answer["goal"], work


def _check_package() -> None:
    if importlib.util.find_spec("z3") is None:
        raise RefusedArgument("reward 'smt' needs z3-solver: pip install 'dsv3_megatron[rewards]'")


CHECKS = {"smt": _check_package}
