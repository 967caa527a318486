"""The figures of a study from curves that are known."""

from pathlib import Path

import pytest

from dsv3_megatron.studies.comparison import compare, draw, relative_errors, table
from dsv3_megatron.studies.demo_runs import smoothed

BASELINE = "bf16"


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
    result = compare(curves, BASELINE, 0.0025, warmup=20)
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
        compare({"fp8": near}, BASELINE, 0.0025, warmup=20)
