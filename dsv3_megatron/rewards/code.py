"""Whether generated Python passes its tests, in the sandbox."""

import json
import re
from typing import Any

from dsv3_megatron.rewards.extract import tagged, without_thoughts
from dsv3_megatron.rewards.sandbox import Limits, Run, run

__all__ = ["CHECKS", "code", "code_fraction", "program_of"]

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)


def code(prompt: str, response: str, answer: Any) -> float:
    """1.0 where the response's program passes every test, else 0.0.

    The program is the last ```python block after the thoughts (inside `<answer>` where there is one), or, where
    there is no block, the text itself.

    Args:
        answer: a dict with one of

            - `"tests"`: Python that is run after the program, or a list of such pieces (`assert f(1) == 2`), each
              run with a program of its own;
            - `"cases"`: a list of {"input": text, "output": text}: the program reads and writes its terminal; white
              space at the ends of lines is not compared;

            and, optional, `"before"`: Python before the program (HumanEval's prompt); `"seconds"`, `"memory_mib"`:
            limits of each run.

    Raises:
        ValueError: the answer is not of this form.
        SandboxUnavailable: programs cannot be confined here.
    """
    return float(all(_results(response, answer)))


def code_fraction(prompt: str, response: str, answer: Any) -> float:
    """Passed tests of `answer`'s list, by their number. See `code`."""
    passed = list(_results(response, answer))
    return sum(passed) / len(passed)


def program_of(response: str) -> str:
    """The program in a response."""
    text = tagged(response)
    text = without_thoughts(response) if text is None else text
    blocks = _FENCE.findall(text)
    python = [body for language, body in blocks if language.lower() in ("", "python", "python3", "py")]
    if python:
        return python[-1]
    return "" if blocks else text


def _results(response: str, answer: Any) -> list[bool]:
    """Whether each test is passed; the first that fails by time or memory is enough for none of the rest to be lost."""
    tests, cases = _checked(answer)
    program = answer.get("before", "") + program_of(response)
    limits = Limits(seconds=answer.get("seconds", 10.0), memory_mib=answer.get("memory_mib", 512))
    if cases is not None:
        return [_printed(run(program, case["input"], limits), case["output"]) for case in cases]
    return [run(f"{program}\n\n{test}\n", limits=limits).finished for test in tests]


def _printed(result: Run, expected: str) -> bool:
    ended = result.finished or (result.outcome == "exited" and result.detail in ("0", "None"))
    return ended and _lines(result.stdout) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _checked(answer: Any) -> tuple[list[str], list[dict[str, str]] | None]:
    if not isinstance(answer, dict) or len(answer.keys() & {"tests", "cases"}) != 1:
        raise ValueError('the answer must be {"tests": …} or {"cases": […]}')
    for name in answer.keys() - {"tests", "cases", "before", "seconds", "memory_mib"}:
        raise ValueError(f"the answer has an unknown key {name!r}")
    if not isinstance(answer.get("before", ""), str):
        raise ValueError('"before" must be Python')
    for name in ("seconds", "memory_mib"):
        value = answer.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name} must be a number above 0, not {json.dumps(value)}")
    if "cases" in answer:
        cases = answer["cases"]
        if not (isinstance(cases, list) and cases and all(_is_case(case) for case in cases)):
            raise ValueError('"cases" must be a list of {"input": text, "output": text}, one at least')
        return [], cases
    tests = answer["tests"] if isinstance(answer["tests"], list) else [answer["tests"]]
    if not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise ValueError('"tests" must be Python, or a list of pieces of it, one at least')
    return tests, None


def _is_case(case: Any) -> bool:
    return isinstance(case, dict) and all(isinstance(case.get(name), str) for name in ("input", "output"))


def _check_sandbox() -> None:
    """Run an empty program, so that a machine without a sandbox is refused before the first sample."""
    run("")


CHECKS = {"code": _check_sandbox, "code_fraction": _check_sandbox}
