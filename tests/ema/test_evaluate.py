"""Which weights an evaluation sees, and what a checkpoint without an average leads to."""

from types import SimpleNamespace

import pytest
import torch

from dsv3_megatron.ema import checkpoint, trainer
from dsv3_megatron.ema.average import WeightAverage
from dsv3_megatron.errors import RefusedArgument


@pytest.mark.parametrize("eval_ema", [False, True])
def test_evaluations_are_of_the_average_where_it_is_asked_for(eval_ema: bool, monkeypatch) -> None:
    weight = torch.zeros(3)
    average = WeightAverage({"w": weight}, decay=0.5)
    weight.fill_(2.0)
    average.update()  # 0.5 · 0 + 0.5 · 2
    monkeypatch.setattr(trainer, "_average", average)
    monkeypatch.setattr(trainer, "_args", lambda: SimpleNamespace(eval_ema=eval_ema))
    seen = trainer.evaluating(lambda prefix: (prefix, weight.tolist()), {"prefix": "iteration 1"})
    expected = ("iteration 1 (average of the weights)", [1.0] * 3) if eval_ema else ("iteration 1", [2.0] * 3)
    assert seen == expected
    assert weight.tolist() == [2.0] * 3


def test_a_skipped_step_does_not_move_the_average(monkeypatch) -> None:
    weight = torch.zeros(3)
    average = WeightAverage({"w": weight}, decay=0.5)
    monkeypatch.setattr(trainer, "_average", average)
    monkeypatch.setattr(trainer, "_args", lambda: SimpleNamespace(overlap_param_gather=False))
    weight.fill_(2.0)
    for skipped, value in ((1, 0.0), (0, 1.0)):
        trainer._after_step({}, ({}, skipped))
        average.wait()
        assert average.average["w"].tolist() == [value] * 3


def test_evaluating_a_checkpoint_without_an_average_is_refused(monkeypatch, tmp_path) -> None:
    args = SimpleNamespace(ema_decay=None, eval_ema=True, skip_train=True, load=str(tmp_path))
    monkeypatch.setattr(trainer, "_args", lambda: args)
    monkeypatch.setattr(checkpoint, "is_in", lambda folder: False)
    with pytest.raises(RefusedArgument, match=r"--eval-ema: the checkpoint .*iter_0000005 has no average"):
        trainer.after_load([], iteration=5)
