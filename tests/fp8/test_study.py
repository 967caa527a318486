"""The study's figures from curves that are known, and its runs as far as their command lines."""

import json
from pathlib import Path

import pytest

from dsv3_megatron.demo.study import smoothed
from dsv3_megatron.fp8 import study
from dsv3_megatron.fp8.study_results import BASELINE, compare, draw, relative_errors, table


def test_smoothed() -> None:
    assert smoothed({1: 1.0, 2: 2.0, 3: 0.0}) == pytest.approx({1: 1.0, 2: 1.1, 3: 0.99})


def test_relative_errors() -> None:
    baseline = dict.fromkeys(range(1, 6), 4.0)
    errors = relative_errors(dict.fromkeys(baseline, 4.02), baseline)
    assert errors == pytest.approx(dict.fromkeys(baseline, 0.005))
    with pytest.raises(LookupError, match="other steps"):
        relative_errors({1: 4.0}, baseline)


def test_compare_table_and_picture(tmp_path: Path) -> None:
    """A run that is off by 1 % in the warm-up and by 0.1 % after it; errors count after the warm-up only."""
    baseline = dict.fromkeys(range(1, 201), 4.0)
    near = dict.fromkeys(baseline, 4.004)
    far = {step: 4.0 if step <= 100 else 4.04 for step in baseline}
    curves = {BASELINE: baseline, "near": near | {1: 4.004}, "far": far}
    result = compare(curves, warmup=20)
    assert result["steps"] == 200 and result["warmup"] == 20 and "max_error" not in result["runs"][BASELINE]
    assert result["runs"]["near"]["max_error"] == pytest.approx(0.001)
    assert result["runs"]["near"]["steps_above_target"] == 0
    run = result["runs"]["far"]
    assert run["max_error"] == pytest.approx(0.01, rel=1e-3) and run["last_error"] == run["max_error"]
    # 1 − 0.9^n > 0.25 from n = 3 on: 98 of the 180 steps.
    assert run["steps_above_target"] == pytest.approx(98 / 180)
    assert "| far | 4.0400 | 1.000% |" in table(result)
    draw(curves, result, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000
    with pytest.raises(LookupError, match="bf16 has not come to its end"):
        compare({"fp8": near}, warmup=20)


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
