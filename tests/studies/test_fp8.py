"""The study's runs, as far as their command lines."""

import json
from pathlib import Path

import pytest

from dsv3_megatron.studies import fp8 as study
from dsv3_megatron.studies.fp8 import BASELINE


@pytest.mark.parametrize("name", study.RUNS)
def test_command_lines(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs differ in precision (and the perturbed one in its initial weights), and in nothing else."""
    from dsv3_megatron.conf import compose

    given: list[list[str]] = []
    monkeypatch.setattr(study.runs, "run_ranks", lambda module, words, ranks, logs: given.append(words))
    for run in (BASELINE, name):
        study.train(run, tmp_path, 1000)
    baseline, other = (compose(words) for words in given)
    differing = {key for key in {*baseline, *other} if baseline.get(key) != other.get(key)}
    files = {"save", "load", "tensorboard_dir"}
    allowed = {"bf16_perturbed": {"init_method_std"}}.get(name, {"fp8_recipe"}) | files
    assert differing <= allowed
    assert baseline["train_iters"] == 1000 and baseline["bf16"] is True


def test_finished_runs_are_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracker = tmp_path / "fp8" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_text("1000")
    monkeypatch.setattr(study.runs, "run_ranks", lambda *args: pytest.fail("trained again"))
    study.train("fp8", tmp_path, 1000)


def test_without_a_baseline_the_error_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["--run-dir", str(tmp_path), "--summarise"]) == 1
    assert "the run bf16 has not come to its end" in capsys.readouterr().err


@pytest.mark.slow
def test_two_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """BF16 and FP8 for a few steps, through the command; the last line is the result."""
    words = ["--run-dir", str(tmp_path), "--iterations", "4", "--only", "bf16", "fp8"]
    assert study.main(words) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["steps"] == 4 and 0 < result["runs"]["fp8"]["max_error"] < 0.01
