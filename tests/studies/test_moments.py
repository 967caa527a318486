"""The study of the moments: its runs' command lines, and what it makes of their losses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.studies import moments as study
from dsv3_megatron.studies.moments import BASELINE, RUNS


def test_runs_differ_in_moments_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dsv3_megatron.arguments import complete
    from dsv3_megatron.arguments.surroundings import detect
    from dsv3_megatron.conf import compose, to_argv

    given: dict[str, Any] = {}
    monkeypatch.setattr(study.study, "prepare", lambda folder: None)
    monkeypatch.setattr(
        study.study,
        "run_ranks",
        lambda module, words, ranks, logs: given.update({logs.parent.name: compose(words)}),
    )
    assert study.main(["--run-dir", str(tmp_path)]) == 1  # nothing was trained
    files = {"save", "load", "tensorboard_dir"}
    allowed = {
        BASELINE: set(),
        "bf16_moments": {"exp_avg_dtype", "exp_avg_sq_dtype"},
        "fp32_perturbed": {"init_method_std"},
    }
    assert given.keys() == RUNS.keys()
    for name, config in given.items():
        baseline = given[BASELINE]
        differing = {key for key in {*config, *baseline} if config.get(key) != baseline.get(key)} - files
        assert differing == allowed[name]
        assert config["lr"] == study.LR and config["bf16"] is True
    words = to_argv(given["bf16_moments"])
    at = words.index("--device")  # our trainer's own option
    elsewhere = replace(detect(), files_here=False)  # no corpus was prepared
    words = complete([*words[:at], *words[at + 2 :]], around=elsewhere)
    for option in ("--exp-avg-dtype", "--exp-avg-sq-dtype"):
        assert words[words.index(option) + 1] == "bf16"


@pytest.mark.parametrize(("factor", "status"), [(1.004, 0), (0.994, 1)])
def test_status(
    factor: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the largest difference after the warm-up; a constant factor is the difference."""
    fp32 = {step: 5.0 - 0.01 * step for step in range(1, 101)}
    curves = {
        BASELINE: fp32,
        "bf16_moments": {s: v * factor for s, v in fp32.items()},
        "fp32_perturbed": fp32,
    }
    monkeypatch.setattr(study.study, "prepare", lambda folder: None)
    monkeypatch.setattr(study.study, "train", lambda *args: None)
    monkeypatch.setattr(study.study, "losses", lambda *args: curves)
    assert study.main(["--run-dir", str(tmp_path), "--iterations", "100"]) == status
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["runs"]["bf16_moments"]["max_error"] == pytest.approx(abs(factor - 1))
    assert result["within_target"] == (status == 0)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
