"""`dsv3 adopt` from the outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.adopt.__main__ import main

SCRIPTS = Path(__file__).parent / "scripts"
ZOO = str(SCRIPTS / "zoo_like.yaml")


def status(words: list[str]) -> object:
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code


def test_a_script_and_its_status() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_megatron", "adopt", str(SCRIPTS / "mindspeed_like.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parents[2])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "  --qk-nope-head-dim 128" in done.stdout
    assert "the script's model, and nothing in it is refused" in done.stdout
    assert "torchrun --nnodes 4 --nproc-per-node 8" in done.stdout and "Traceback" not in done.stderr


def test_a_problem_is_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert status([ZOO, "--set", "SEQ_LEN=64", "MBS=1", "GBS=4", "TP=3", "--ranks", "8"]) == 1
    assert "problem: --tensor-model-parallel-size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere.sh"], "nowhere.sh: there is no such file"),
        ([ZOO, "--set", "SEQ_LEN"], "--set SEQ_LEN: write NAME=VALUE"),
        ([ZOO, "--ranks", "9", "--ranks-per-node", "8"], "--ranks 9: is not divisible"),
    ],
)
def test_wrong_words(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named}") and len(error.strip().splitlines()) == 1


def test_a_script_of_ours_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert status([str(SCRIPTS.parents[2] / "examples" / "pretrain_dsv3_hydra.sh")]) == 2
    assert "starts dsv3_megatron.train_hydra, which is this project's already" in capsys.readouterr().err
