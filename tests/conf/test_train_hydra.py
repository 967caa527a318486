"""The Hydra trainer: what it prints, and that it trains as the plain command line does."""

import math
import os
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dsv3_megatron import train, train_hydra
from tests.harness import run_distributed

SMALL = ["model=micro", "train_iters=3", "global_batch_size=8", "seq_length=32", "max_position_embeddings=32"]


def test_prints_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    train_hydra.main(["--cfg", "job", *SMALL])
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert cfg.train_iters == 3 and cfg.cluster.gpus_per_node == 4


def test_prints_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    train_hydra.main(["model=micro", "--cfg", "command", "layout=cpu_single"])
    out = capsys.readouterr().out
    assert out.startswith(
        "torchrun --nnodes 1 --nproc-per-node 1 -m dsv3_megatron.train --device cpu --spec dsv3 "
    )


def test_only_rank_0_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    train_hydra.main(["--cfg", "job"])
    with pytest.raises(SystemExit):
        train_hydra.main(["--cfg", "job", "model=nano"])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cfg", "yaml"], "error: --cfg yaml: use --cfg command or --cfg job"),
        (["--cfg"], "error: --cfg : use --cfg command"),
        (["model=nano"], "error: model=nano: no such model"),
        (["--cfg", "command", "train_iter=3"], "did you mean 'train_iters'?"),
        ([], "use torchrun --nproc-per-node 4"),
    ],
)
def test_errors_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train_hydra.main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def hydra_run(rank: int, world_size: int, words: list[str], folder: Path) -> list[str]:
    """Trains in an empty working folder; returns what lies there afterwards."""
    os.chdir(folder)
    train_hydra.main(words)
    assert Path.cwd() == folder
    return os.listdir()


def plain_run(rank: int, world_size: int, words: list[str]) -> None:
    train.main(words)


def losses(folder: Path, world_size: int) -> list[str]:
    """`lm loss` of every step, from the last rank's log: Megatron prints it there."""
    return re.findall(r"lm loss: (\S+)", (folder / f"rank{world_size - 1}.log").read_text())


def folder_in(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def test_trains_and_leaves_the_working_folder_alone(tmp_path: Path) -> None:
    logs, empty = folder_in(tmp_path, "logs"), folder_in(tmp_path, "empty")
    left = run_distributed(hydra_run, 4, init=False, log_dir=logs, timeout=180, words=SMALL, folder=empty)
    assert left == [[]] * 4
    first, *_, last = (float(loss) for loss in losses(logs, 4))
    assert first == pytest.approx(math.log(256), abs=0.2)  # untrained: uniform over the vocabulary
    assert last < first


@pytest.mark.slow
def test_trains_as_the_printed_command_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_hydra.main(["--cfg", "command", *SMALL])
    words = shlex.split(capsys.readouterr().out)
    words = words[words.index("dsv3_megatron.train") + 1 :]
    hydra, plain, empty = (folder_in(tmp_path, name) for name in ("hydra", "plain", "empty"))
    run_distributed(hydra_run, 4, init=False, log_dir=hydra, timeout=180, words=SMALL, folder=empty)
    run_distributed(plain_run, 4, init=False, log_dir=plain, timeout=180, words=words)
    assert len(losses(hydra, 4)) == 3
    assert losses(hydra, 4) == losses(plain, 4)
