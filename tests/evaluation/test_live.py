"""`--eval-tasks`: training goes on as without it, to the bit; the results are those of the saved checkpoint."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_megatron.arguments.entry import refuse_what_only_our_trainer_does
from dsv3_megatron.demo.results import read_curves
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation import live
from tests.arguments.lines import MICRO
from tests.evaluation.conftest import VOCABULARY
from tests.evaluation.test_against_hf import last_line
from tests.harness import run_distributed

SEQUENCE = 128
STEPS = 2
TASKS = ("dsv3_choice_en", "dsv3_text_en")
WRITES = "dsv3_facts_en"  # a pass for each of 64 tokens: in one layout
LIMIT = 2
BOUND = 2e-5

LAYOUTS: dict[str, tuple[int, str]] = {
    "DualPipe": (2, "--pipeline-schedule dualpipe --pipeline-model-parallel-size 2"),
    "DualPipeV": (2, "--pipeline-schedule dualpipev --pipeline-model-parallel-size 2"),
    "ZB1P": (2, "--pipeline-schedule zb1p --pipeline-model-parallel-size 2"),
    "1F1B": (2, "--pipeline-model-parallel-size 2"),
    "interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "TP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "overlap": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "one": (1, "--micro-batch-size 2"),
}


def train(rank: int, world_size: int, words: list[str]) -> None:
    from dsv3_megatron import train

    train.main(words)


def words(tokenizer: Path, folder: Path, layout: str) -> list[str]:
    micro = (
        " ".join(MICRO)
        .replace(" --vocab-size 128", "")
        .replace("--seq-length 32", f"--seq-length {SEQUENCE}")
    )
    return [
        "--spec", "dsv3", "--device", "cpu", *micro.split(), *layout.split(), "--train-iters", str(STEPS),
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer),
        "--padded-vocab-size", str(VOCABULARY), "--max-position-embeddings", str(SEQUENCE),
        "--tensorboard-dir", str(folder / "tensorboard"), "--tensorboard-log-interval", "1", "--log-interval", "1",
    ]  # fmt: skip


def run(size: int, argv: list[str], folder: Path) -> dict[str, Any]:
    run_distributed(train, size, timeout=400, init=False, words=argv)
    return read_curves(folder / "tensorboard")


@pytest.mark.parametrize(
    "name", [name if name == "DualPipe" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_training_is_unchanged_and_results_are_the_checkpoint_s(name, hf, tmp_path):
    size, layout = LAYOUTS[name]
    plain = run(size, words(hf, tmp_path / "plain", layout), tmp_path / "plain")
    folder = tmp_path / "evaluated"
    tasks = (*TASKS, WRITES) if name == "one" else TASKS
    more = ["--eval-tasks", ",".join(tasks), "--eval-tasks-interval", "1", "--eval-tasks-limit", str(LIMIT)]
    more += ["--save", str(folder / "save"), "--save-interval", str(STEPS)]
    evaluated = run(size, [*words(hf, folder, layout), *more], folder)
    for loss in ("lm loss", "mtp_1 loss", "grad-norm"):
        assert evaluated[loss] == plain[loss] and len(plain[loss]) == STEPS, loss
    found = {tag: curve for tag, curve in evaluated.items() if tag.startswith("eval/")}
    assert not any(tag.startswith("eval/") for tag in plain)
    assert all(list(curve) == [1, 2] for curve in found.values())
    perplexities = found["eval/dsv3_text_en/byte_perplexity"]
    assert perplexities[1] != perplexities[2]  # of the weights as they were

    argv = ["--load", str(folder / "save"), "--device", "cpu", "--tasks", *tasks, "--limit", str(LIMIT)]
    result = last_line([*argv, "--bootstrap-iters", "0", "--json"])
    expected = {
        f"eval/{task}/{metric.removesuffix(',none')}": value
        for task, metrics in result["results"].items()
        for metric, value in metrics.items()
        if value is not None
    }
    assert expected.keys() == found.keys()
    for tag, value in expected.items():
        assert found[tag][STEPS] == pytest.approx(value, rel=BOUND), tag


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("dsv3_choice_en", "--eval-tasks-interval", "0"), "--eval-tasks-interval 0: is not possible"),
        (("dsv3_choice_en", "--eval-tasks-interval", "2", "--eval-tasks-limit", "0"), "--eval-tasks-limit 0"),
        (("dsv3_choice_en",), "nothing says how often"),
        (
            ("dsv3_needel", "--eval-tasks-interval", "2"),
            "dsv3_needel: no such task; did you mean dsv3_needle?",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_named_before_anything_is_built(more, named, hf, tmp_path):
    from dsv3_megatron.train import main

    argv = [*words(hf, tmp_path, "--micro-batch-size 1"), "--eval-tasks", *more]
    with pytest.raises(RefusedArgument) as refused:
        main(argv)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("arc_easy", "--eval-tasks arc_easy: its data (allenai/ai2_arc) is not on this machine"),
        (
            "dsv3_humaneval",
            "--eval-tasks dsv3_humaneval: it generates up to 512 tokens, which leaves no room",
        ),
        (
            "sampled",
            "--eval-tasks sampled: it samples (temperature 0.7), which is not possible during training",
        ),
    ],
)
def test_tasks_that_are_not_possible_in_training_are_named(task, named, tmp_path, monkeypatch):
    yaml = (
        "task: sampled\ncustom_dataset: !function ours.rows\noutput_type: generate_until\ntest_split: test\n"
    )
    yaml += 'doc_to_text: "x"\ndoc_to_target: "y"\ngeneration_kwargs: {until: [z], do_sample: true, temperature: 0.7}\n'
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "sampled.yaml").write_text(yaml)
    rows = "def rows(**unused):\n    return {'test': Dataset.from_list([{'q': 'x'}])}\n"
    (mine / "ours.py").write_text(f"from datasets import Dataset\n\n\n{rows}")
    monkeypatch.setattr(
        live.catalog, "_roots", lambda include, roots=live.catalog._roots: [tmp_path, *roots(None)]
    )
    with pytest.raises(RefusedArgument) as refused:
        live._loaded(SimpleNamespace(eval_tasks=[task], seq_length=SEQUENCE))
    assert named in str(refused.value)


def test_pretrain_gpt_does_not_ignore_it():
    others = {
        "sft_data": None,
        "posttrain": None,
        "loss_spike_factor": None,
        "moe_token_dispatcher_type": "alltoall",
        "on_bad_step": "stop",
    }
    refuse_what_only_our_trainer_does(Namespace(eval_tasks=None, **others))
    with pytest.raises(RefusedArgument, match=r"--eval-tasks a b: pretrain_gpt\.py has its own"):
        refuse_what_only_our_trainer_does(Namespace(eval_tasks=["a", "b"], **others))


def compare(rank: int, world_size: int, argv: list[str]) -> dict[str, Any]:
    """After the first step: the trainer's pipeline and the engine, over the same weights."""
    from dsv3_megatron import train
    from dsv3_megatron.evaluation.engine_scorer import EngineScorer
    from dsv3_megatron.evaluation.scorer import Request, Row
    from dsv3_megatron.evaluation.trainer_scorer import TrainerScorer
    from dsv3_megatron.inference import Engine, EngineSettings
    from dsv3_megatron.training import hooks
    from tests.inference.models import prompts

    texts = [tuple(tokens) for tokens in prompts(5, 40, 1, 17, 100, vocab_size=VOCABULARY, seed=3)]
    rows = [Row(tokens, min(len(tokens) - 1, 9)) for tokens in texts if len(tokens) > 1]
    requests = [Request(tokens, 6 + place, stop=("e",)) for place, tokens in enumerate(texts)]
    found: dict[str, Any] = {}

    def decode(tokens: list[int]) -> str:
        return "".join("abcdefgh"[token % 8] for token in tokens)

    def after(call: dict[str, Any], result: Any) -> None:
        if found:
            return
        (chunk,) = call["model"]
        chunk.eval()
        by_trainer = TrainerScorer(call["model"], [7], decode)
        engine = Engine(chunk, EngineSettings(SEQUENCE + 1, max_batch=8), [7], decode)
        by_engine = EngineScorer(engine, SEQUENCE)
        for name, scorer in (("trainer", by_trainer), ("engine", by_engine)):
            found[name] = (scorer.score(rows), scorer.generate(requests))
        engine.close()
        chunk.train()

    hooks.after_step(after)
    train.main(argv)
    return found


@pytest.mark.slow
def test_the_trainer_scores_and_writes_as_the_engine_does(hf, tmp_path):
    argv = words(hf, tmp_path, LAYOUTS["one"][1])
    (found,) = run_distributed(compare, 1, timeout=400, init=False, argv=argv)
    scores, answers = found["trainer"]
    expected, written = found["engine"]
    assert answers == written and len({len(answer) for answer in answers.values()}) > 1
    assert scores.keys() == expected.keys()
    for place, score in expected.items():
        assert scores[place].log_prob == pytest.approx(score.log_prob, rel=1e-5)
        assert scores[place].greedy == score.greedy
