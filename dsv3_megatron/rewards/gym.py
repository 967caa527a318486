"""The tasks of reasoning-gym: procedural, each with a scorer of its own (extra `rewards`).

`problems("basic_arithmetic", 100, seed=1)` gives lines for a file of prompts; the entry travels as the answer.
"""

import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.rewards.extract import final_answer

__all__ = ["CHECKS", "gym", "problems"]


def gym(prompt: str, response: str, answer: Any) -> float:
    """The task's own score of the response's final answer, from 0 to 1; 0.0 where there is none.

    Args:
        answer: {"dataset": name, "entry": the generated task (question, answer, metadata)}, as `problems` gives it.

    Raises:
        ValueError: the answer is not of this form, or names no task.
    """
    if not isinstance(answer, dict) or answer.keys() < {"dataset", "entry"}:
        raise ValueError('the answer must be {"dataset": name, "entry": {…}} (rewards.gym.problems)')
    found = final_answer(response)
    return 0.0 if found is None else float(_scorer(answer["dataset"])(found, answer["entry"]))


def problems(dataset: str, number: int, seed: int = 0, **settings: Any) -> Iterator[dict[str, Any]]:
    """Generated tasks as {"prompt": text, "answer": {"dataset", "entry"}}, JSON values.

    Args:
        dataset: reasoning-gym's name of the task.
        settings: of its generator (max_terms, …).

    Raises:
        RefusedArgument: no such task or setting, or the package is missing.
    """
    _check_package()
    import reasoning_gym

    try:
        entries = reasoning_gym.create_dataset(dataset, size=number, seed=seed, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise RefusedArgument(f"dataset {dataset!r}: {error}") from error
    for entry in entries:
        yield {"prompt": entry["question"], "answer": {"dataset": dataset, "entry": entry}}


@cache
def _scorer(dataset: str) -> Any:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(dataset)


def _check_package() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise RefusedArgument("reward 'gym' needs reasoning-gym: pip install 'dsv3_megatron[rewards]'")


CHECKS = {"gym": _check_package}
