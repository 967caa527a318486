"""The same tasks by the harness's own `hf` model, and how its results compare with ours."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.evaluation import catalog
from dsv3_megatron.evaluation.setting import Setting, use

TASKS = ("dsv3_choice_en", "dsv3_choice_zh", "dsv3_text_en", "dsv3_text_zh", "dsv3_facts_en", "dsv3_needle")
NEEDLES = (150, 230)
LIMIT = 3
BOUND = 1e-5  # of each value, relative to its size where that is above 1


def words(kind: str, folder: Path, output: Path | None = None, tasks: tuple[str, ...] = TASKS) -> list[str]:
    """Of `dsv3 evaluate` for these tasks."""
    needles = ["--needle-lengths", *map(str, NEEDLES)] if "dsv3_needle" in tasks else []
    return [
        kind, str(folder), "--device", "cpu", "--tasks", *tasks, "--limit", str(LIMIT), "--json",
        *needles, *(["--output", str(output)] if output else []),
    ]  # fmt: skip


def hf_results(folder: Path, tasks: tuple[str, ...] = TASKS, **how: Any) -> dict[str, Any]:
    """Of the harness's `simple_evaluate` with its `hf` model, fp32."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
    use(
        Setting(
            max_length=model.max_length,
            count=lambda text: len(model.tokenizer.encode(text)),
            needle_lengths=NEEDLES,
        )
    )
    manager = TaskManager(include_path=str(catalog.OURS), include_defaults=False)
    torch.manual_seed(0)
    return simple_evaluate(model, tasks=list(tasks), task_manager=manager, **({"limit": LIMIT} | how))


def metrics_of(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """By task and metric, numbers alone."""
    return {
        task: {
            name: value if math.isfinite(value) else None
            for name, value in values.items()
            if "," in name and isinstance(value, int | float)
        }
        for task, values in results["results"].items()
    }


def same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal, and numbers within the bound."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            same(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for place, value in enumerate(theirs):
            same(ours[place], value, f"{where}/{place}")
    elif isinstance(theirs, float) and isinstance(ours, int | float):
        assert math.isclose(ours, theirs, rel_tol=BOUND, abs_tol=BOUND), (where, ours, theirs)
    else:
        assert ours == theirs, (where, ours, theirs)


def same_samples(output: Path, results: dict[str, Any]) -> int:
    """Every response of every sample; how many there were."""
    count = 0
    for task, samples in results["samples"].items():
        ours = [json.loads(line) for line in (output / f"samples_{task}.jsonl").read_text().split("\n")[:-1]]
        assert len(ours) == len(samples), task
        for mine, sample in zip(ours, json.loads(json.dumps(samples, default=str)), strict=True):
            assert mine["arguments"] == sample["arguments"], task
            same(_typed(mine["resps"]), _typed(sample["resps"]), task)
            same(_typed(mine["filtered_resps"]), _typed(sample["filtered_resps"]), task)
            count += 1
    return count


def _typed(value: Any) -> Any:
    """Numbers that were written as text are numbers again."""
    if isinstance(value, list):
        return [_typed(each) for each in value]
    try:
        return float(value) if isinstance(value, str) and "." in value else value
    except ValueError:
        return value
