"""An evaluation by the harness, and its results as plain figures."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation.grading import calibration
from dsv3_megatron.evaluation.model import HarnessModel
from dsv3_megatron.evaluation.needle import grid
from dsv3_megatron.evaluation.pictures import draw_calibration, draw_needles

__all__ = ["check", "figures", "num_samples", "run", "write"]

FEWSHOT_SEED = 1234  # the harness's
BOOTSTRAPS = 100_000  # the harness's

Results = dict[str, Any]


def run(
    model: HarnessModel,
    loaded: Any,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    system: str | None = None,
    bootstraps: int = BOOTSTRAPS,
    unsafe_code: bool = False,
) -> Results:
    """Evaluate tasks as the harness's `simple_evaluate` does; its results, with samples.

    The random numbers of this process are left alone: a run in training goes on as if nothing had been evaluated.

    Args:
        loaded: of `catalog.load_tasks`.
        limit: documents of each task, the first ones; None for all.
        num_fewshot: examples before each question; None for what the tasks say.
        chat_template: ask in the tokenizer's chat template, with `system` first.
        bootstraps: draws of standard errors without a formula; 0 for no standard errors.
        unsafe_code: allow tasks that run generated code without our sandbox.

    Raises:
        RefusedArgument: a task is not possible.
    """
    from lm_eval.evaluator import evaluate

    check(loaded, unsafe_code)
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if num_fewshot and own == 0:
            print(f"--num-fewshot {num_fewshot}: {name} is without examples, and stays so", file=sys.stderr)
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with _random_numbers_kept(), _no_bars():
        try:
            return evaluate(
                lm=model,
                task_dict=loaded,
                limit=None if limit is None else min(limit, sys.maxsize),
                bootstrap_iters=bootstraps,
                system_instruction=system,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=unsafe_code,
            )
        except ValueError as error:
            if "larger than population" not in str(error):  # of random.sample
                raise
            raise RefusedArgument(
                f"--num-fewshot {num_fewshot}: one of {', '.join(loaded['tasks'])} has not as many examples"
            ) from error
        except OverflowError as error:
            raise RefusedArgument(
                f"a metric of {', '.join(loaded['tasks'])} is too large for a number ({error}): a word's perplexity of "
                "a model that has learned nothing, for instance; leave the task out"
            ) from error


def check(loaded: Any, unsafe_code: bool = False, option: str = "--tasks") -> None:
    """Raise `RefusedArgument` where a task runs generated code without our sandbox, unless `unsafe_code`."""
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
            raise RefusedArgument(
                f"{option} {name}: runs what the model writes without a sandbox; use dsv3_humaneval, or dsv3 evaluate "
                "with --confirm-run-unsafe-code"
            )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Making the questions of a task takes no time that a bar could show."""
    from unittest import mock

    with mock.patch("lm_eval.api.task.tqdm", lambda documents, **unused: documents):
        yield


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def figures(results: Results) -> dict[str, dict[str, float | None]]:
    """`{task: {metric: value}}` by the harness's own names ("acc,none", "acc_stderr,none"), groups too.

    None for what is not a number of its own (a calibration without any stated confidence).
    """
    found: dict[str, dict[str, float | None]] = {}
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        found[task] = {
            name: float(value) if math.isfinite(value) else None
            for name, value in values.items()
            if "," in name and isinstance(value, int | float) and not isinstance(value, bool)
        }
    return found


def num_samples(results: Results) -> int:
    """Documents evaluated, of all tasks together."""
    return sum(counts["effective"] for counts in results["n-samples"].values())


def write(results: Results, folder: Path) -> list[Path]:
    """results.json, samples_TASK.jsonl of each task, needle.png and calibration_TASK.png; the files."""
    files = [folder / "results.json"]
    summary: dict[str, Any] = {"results": figures(results), "num_samples": num_samples(results)}
    for task, samples in results["samples"].items():
        files.append(folder / f"samples_{task}.jsonl")
        lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        files[-1].write_text("".join(lines), encoding="utf-8")
        if samples and "found" in samples[0]:
            lengths, depths, table = grid(samples)
            files.append(folder / "needle.png")
            draw_needles(lengths, depths, table, files[-1])
            summary["needle"] = {"lengths": lengths, "depths": depths, "found": table}
        if samples and "calibration_error" in samples[0]:
            bins = calibration([sample["calibration_error"] for sample in samples])
            files.append(folder / f"calibration_{task}.png")
            draw_calibration(bins, files[-1])
            summary.setdefault("calibration", {})[task] = bins
    files[0].write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return files
