"""The trainer as a command: wrong lines end with one message and status 2, before anything is built."""

import sys

import pytest
import torch

from dsv3_megatron import cpu, train
from dsv3_megatron.arguments import RefusedArgument
from tests.arguments.lines import MICRO


def run(monkeypatch, capsys, *words):
    """Exit status and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as ended:
        train.command()
    assert not torch.distributed.is_initialized()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fp16", "error: --fp16: "),
        ("--normalization LayerNorm", "error: --normalization LayerNorm contradicts DeepSeek-V3"),
        ("--num-layer 3", "error: unrecognized arguments: --num-layer 3; did you mean --num-layers"),
        ("--device tpu", "error: --device tpu: use cuda (the default) or cpu"),
        ("--save /proc/nowhere --save-interval 1", "error: --save /proc/nowhere: No such file or directory"),
        # Known before Megatron's own assertion.
        (
            "--lr 1e-5 --min-lr 1e-3",
            "error: --min-lr / --lr-warmup-init 0.001 / 0.0: is above the peak --lr 1e-05",
        ),
    ],
)
def test_wrong_line(monkeypatch, capsys, words, message):
    status, err = run(monkeypatch, capsys, "--spec", "dsv3", "--device", "cpu", *MICRO, *words.split())
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith(message)
    assert "Traceback" not in err


def test_only_rank_0_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    status, err = run(monkeypatch, capsys, "--device", "cpu", *MICRO, "--fp16")
    assert status == 2 and "error:" not in err


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(cpu, "is_active", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RefusedArgument, match=r"no GPU is visible\. Use --device cpu"):
        train.main(["--spec", "dsv3", *MICRO])


def test_cpu_runtime_is_refused_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(cpu, "is_active", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RefusedArgument, match="--device cpu: a GPU is visible"):
        train.main(["--spec", "dsv3", "--device", "cpu", *MICRO])


def test_cpu_flags_give_way_to_the_users():
    given = ["--transformer-impl", "transformer_engine", "--no-rope-fusion"]
    added = list(train._options_not_in(given, cpu.CPU_FLAGS))
    assert "local" not in added and "--no-rope-fusion" not in added
    assert "--no-masked-softmax-fusion" in added


def test_the_process_keeps_its_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["before", "--x"])
    with pytest.raises(RefusedArgument):
        train.main(["--device", "cpu", *MICRO, "--lr", "1e-5", "--min-lr", "1e-3"])
    assert sys.argv == ["before", "--x"]
