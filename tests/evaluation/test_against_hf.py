"""`dsv3 evaluate` against the harness's own `hf` model on the same weights: every metric, every sample."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.serve.evaluate import main
from tests.convert.releases import YARN, micro, release, v2_lite
from tests.evaluation.by_harness import (
    LIMIT,
    NEEDLES,
    TASKS,
    hf_results,
    metrics_of,
    same,
    same_samples,
    words,
)
from tests.evaluation.conftest import CONTEXT, VOCABULARY
from tests.harness import run_distributed


def last_line(argv: list[str]) -> dict[str, Any]:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(argv) == 0
    return json.loads(out.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def theirs(hf: Path) -> dict[str, Any]:
    return hf_results(hf)


def test_every_metric_and_every_sample_is_the_harness_own(hf, checkpoint, theirs, tmp_path):
    result = last_line(words("--load", checkpoint, tmp_path))
    assert list(result) == ["results", "num_samples"]
    assert list(result["results"]) == list(TASKS)
    assert result["num_samples"] == len(TASKS) * LIMIT
    same(result["results"], metrics_of(theirs))
    assert same_samples(tmp_path, theirs) == len(TASKS) * LIMIT
    # Are the metrics of the kind that would differ? Another model's do.
    assert 1 < result["results"]["dsv3_text_en"]["byte_perplexity,none"] < 1e4
    assert (tmp_path / "needle.png").stat().st_size > 1000
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["needle"]["lengths"] == [NEEDLES[0]]  # the first documents, as --limit says


def test_another_model_has_other_figures(hf, theirs, tmp_path):
    """The control: weights of another seed fail the comparison."""
    other = tmp_path / "other"
    release(other, micro(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT), seed=7)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(hf / name, other / name)
    task = ("dsv3_text_en",)
    result = last_line(words("--hf", other, tasks=task))
    with pytest.raises(AssertionError):
        same(result["results"], {"dsv3_text_en": metrics_of(theirs)["dsv3_text_en"]})


LAYOUTS = {
    "EP2": ["--expert-model-parallel-size", "2"],
    "TP2": ["--tensor-model-parallel-size", "2"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "DP2": [],
}


def evaluate_on_rank(rank: int, world_size: int, argv: list[str]) -> int:
    return main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout(layout, checkpoint, theirs, tmp_path):
    argv = [*words("--load", checkpoint, tmp_path), *LAYOUTS[layout]]
    assert run_distributed(evaluate_on_rank, 2, init=False, argv=argv) == [0, 0]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    same(results, metrics_of(theirs))
    assert same_samples(tmp_path, theirs) == len(TASKS) * LIMIT


@pytest.mark.slow
def test_conversations_by_the_chat_template(hf, checkpoint, tmp_path):
    tasks = ("dsv3_choice_en", "dsv3_facts_en")
    more = ["--apply-chat-template", "--system-instruction", "Be brief."]
    result = last_line([*words("--load", checkpoint, tmp_path, tasks), *more])
    theirs = hf_results(hf, tasks, apply_chat_template=True, system_instruction="Be brief.")
    same(result["results"], metrics_of(theirs))
    assert same_samples(tmp_path, theirs) == 2 * LIMIT
    sample = json.loads((tmp_path / "samples_dsv3_facts_en.jsonl").read_text().split("\n")[0])
    assert "Be brief." in sample["arguments"][0][0] and len(sample["arguments"][0][0]) > 100


@pytest.mark.slow
def test_all_documents_with_examples(hf, checkpoint, tmp_path):
    """More rows than fit at once, one-token and many-token continuations, examples before the question."""
    tasks = ("dsv3_choice_en", "dsv3_choice_zh")
    argv = [
        "--load", str(checkpoint), "--device", "cpu", "--tasks", ",".join(tasks), "--num-fewshot", "2",
        "--output", str(tmp_path), "--json", "--max-batch", "5", "--max-step-tokens", "50",
    ]  # fmt: skip
    result = last_line(argv)
    theirs = hf_results(hf, tasks, limit=None, num_fewshot=2)
    same(result["results"], metrics_of(theirs))
    assert same_samples(tmp_path, theirs) == 48 == result["num_samples"]


def _without_bos(config: dict[str, Any]) -> None:
    del config["bos_token"]


def _bos_before_each_text(config: dict[str, Any]) -> None:
    config["add_bos_token"] = True


SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
OTHERS: dict[str, tuple[Any, Callable[[dict[str, Any]], None]]] = {
    "YaRN, no BOS": (lambda: micro(**SIZES, rope_parameters=YARN), _without_bos),
    "V2-Lite": (lambda: v2_lite(**SIZES), lambda config: None),
    "BOS before each text, query uncompressed": (
        lambda: micro(**SIZES, q_lora_rank=None),
        _bos_before_each_text,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_and_tokenizers(name, hf, tmp_path):
    config, change = OTHERS[name]
    folder, output = tmp_path / "model", tmp_path / "output"
    release(folder, config(), seed=3)
    for file in ("tokenizer.json", "generation_config.json"):
        shutil.copy(hf / file, folder / file)
    tokenizer = json.loads((hf / "tokenizer_config.json").read_text())
    change(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    tasks = ("dsv3_choice_zh", "dsv3_text_en", "dsv3_facts_en")
    theirs = hf_results(folder, tasks)
    same(last_line(words("--hf", folder, output, tasks))["results"], metrics_of(theirs))
    assert same_samples(output, theirs) == len(tasks) * LIMIT
