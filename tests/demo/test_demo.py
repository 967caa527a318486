"""`python -m dsv3_megatron.demo`: a few iterations, then again; the whole of it is a slow test."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.demo.results import read_curves
from dsv3_megatron.pipeline.actions import Kind
from dsv3_megatron.pipeline.trace import read_trace

KEYS = [
    "val_loss",
    "unigram_loss",
    "shuffled_context_loss",
    "mtp_loss",
    "tokens_per_s",
    "max_over_mean_expert_load",
    "iteration",
    "resumed_from",
]
SMALL = ["--train-iters", "4", "--more-iters", "2", "--num-windows", "8", "--corpus-bytes", "1000000"]
SMALL += ["seq_length=64", "max_position_embeddings=64", "global_batch_size=8", "micro_batch_size=1"]
SMALL += ["expert_model_parallel_size=1"]  # two processes; the whole demo has four
SMALL += ["--no-evaluation"]  # tests/evaluation has it; a context of 64 holds no haystack


def demo(run_dir: Path, *words: str, timeout: float = 240) -> tuple[dict, list[str]]:
    """The JSON object of the last line on stdout, and the lines before it."""
    command = [sys.executable, "-m", "dsv3_megatron.demo", "--run-dir", str(run_dir), *words]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stdout + run.stderr
    *lines, last = run.stdout.splitlines()
    result = json.loads(last)
    assert list(result) == KEYS
    return result, lines


def check_picture(path: Path) -> None:
    from matplotlib import image

    pixels = image.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 800
    assert pixels.std() > 0.05  # not blank


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_few_iterations_and_resume(tmp_path, again):
    first, lines = demo(tmp_path, *SMALL)
    assert (first["iteration"], first["resumed_from"]) == (4, 0)
    assert any(line.startswith("[demo] iteration 4/4") for line in lines)
    # Four iterations teach next to nothing: losses are near that of a guess among 2048 tokens.
    for name in ("val_loss", "shuffled_context_loss", "mtp_loss"):
        assert first[name] == pytest.approx(math.log(2048), abs=0.7), name
    assert 4.0 < first["unigram_loss"] < math.log(2048)
    assert 1.0 <= first["max_over_mean_expert_load"] <= 8 / 2  # 8 experts, two per token
    assert first["tokens_per_s"] > 0
    check_picture(tmp_path / "loss.png")
    check_picture(tmp_path / "pipeline_step4.png")
    measured = read_trace(tmp_path / "pipeline_step4.json")["measured"]
    assert {event.rank for event in measured} == {0, 1}
    assert any(event.action.kind is Kind.PAIR for event in measured)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "result.json").read_text()) == first

    if not again:
        return
    second, lines = demo(tmp_path, *SMALL)
    assert (second["iteration"], second["resumed_from"]) == (6, 4)
    assert (tmp_path / "pipeline_step6.svg").exists()
    assert any("resuming from iteration 4, to iteration 6" in line for line in lines)
    assert second["unigram_loss"] == first["unigram_loss"]
    assert second["val_loss"] != first["val_loss"]
    curves = read_curves(tmp_path / "tensorboard")
    assert sorted(curves["lm loss"]) == [1, 2, 3, 4, 5, 6]
    # The resumed model is the trained one: its loss goes on from there.
    assert curves["lm loss"][5] < curves["lm loss"][1]


@pytest.mark.slow
def test_whole_demo_learns_in_time(tmp_path):
    start = time.monotonic()
    result, lines = demo(tmp_path, timeout=900)
    seconds = time.monotonic() - start
    assert result["val_loss"] < result["unigram_loss"] - 1.0
    assert result["shuffled_context_loss"] > result["val_loss"] + 0.2
    assert result["max_over_mean_expert_load"] < 2.0
    (text,) = [line for line in lines if line.startswith("[demo] dsv3_text: byte_perplexity ")]
    assert 1 < float(text.split()[3].rstrip(",")) < 8  # bytes of text, a guess among 256 is 256
    assert (tmp_path / "evaluation" / "iteration_200" / "needle.png").exists()
    assert seconds < 300


@pytest.mark.slow
def test_same_run_gives_the_same_losses(tmp_path):
    results = [demo(tmp_path / name, *SMALL)[0] for name in ("a", "b")]
    for name in (
        "val_loss",
        "unigram_loss",
        "shuffled_context_loss",
        "mtp_loss",
        "max_over_mean_expert_load",
    ):
        assert results[0][name] == results[1][name], name
