"""bf16 moments by Megatron's own arguments, through the trainer, saved and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arguments.lines import MICRO
from tests.harness import run_distributed

OPTIONS = (
    "--spec dsv3 --device cpu --bf16 --use-distributed-optimizer --expert-model-parallel-size 2 "
    "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 "
    "--main-params-dtype fp32 --main-grads-dtype fp32 --log-interval 2 --lr-decay-iters 10"
)
WORDS = [*MICRO, *OPTIONS.split()]


def train(
    rank: int, world_size: int, words: list[str], fp8_branch: bool = False
) -> tuple[float, set[torch.dtype]]:
    """Mean loss of the last two steps, and the types of the optimizer's states.

    fp8_branch: as under FP8 with Transformer Engine, where Megatron holds the fp32 masters and gives their gradients as
        `grad`, not `decoupled_grad`.
    """
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    from dsv3_megatron import metrics
    from dsv3_megatron.optimizer import AdamW
    from dsv3_megatron.train import main

    if fp8_branch:
        validate = OptimizerConfig.__post_init__

        def __post_init__(self: OptimizerConfig) -> None:
            self.fp8_recipe = "custom"
            validate(self)
            assert not self.use_precision_aware_optimizer_no_fp8_or_ds_fp8

        OptimizerConfig.__post_init__ = __post_init__  # type: ignore[method-assign]
    types: set[Any] = set()
    original = AdamW.step

    def step(self: AdamW) -> None:
        assert self.use_decoupled_grad != fp8_branch and self.master_weights != fp8_branch
        original(self)
        types.update((name, tensor.dtype) for state in self.state.values() for name, tensor in state.items())

    AdamW.step = step  # type: ignore[method-assign, assignment]
    main([*WORDS, *words])
    return metrics.latest()["lm_loss"], types


def run(*words: str, fp8_branch: bool = False) -> list[tuple[float, set[torch.dtype]]]:
    words = ("--train-iters", "4", *words)
    return run_distributed(train, world_size=2, init=False, words=list(words), fp8_branch=fp8_branch)


def saving(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", "2", "--dist-ckpt-optim-fully-reshardable"]


def at_step_2(folder: Path) -> list[str]:
    """How to go on from there: what was saved later is gone."""
    for later in folder.glob("iter_0000004/*"):
        later.unlink()
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return ["--load", str(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, set[torch.dtype]]]]:
    """Four steps, saved after two of them, with the optimizer's own masters."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(*saving(folder))


def test_training_saving_and_resuming(plain: Any) -> None:
    folder, whole = plain
    again = run(*at_step_2(folder))
    moments = {("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.bfloat16), ("master_param", torch.float32)}
    for (loss, types), (resumed_loss, resumed_types) in zip(whole, again, strict=True):
        assert types == resumed_types == moments
        assert loss == resumed_loss


def test_the_branch_of_fp8(plain: Any, tmp_path: Path) -> None:
    """Megatron's masters in place of the optimizer's: the same losses, bf16 moments, and a resumed run goes on."""
    whole = run(*saving(tmp_path), fp8_branch=True)
    again = run(*at_step_2(tmp_path), fp8_branch=True)
    moments = {("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.bfloat16)}
    for (loss, types), (resumed_loss, _), (plain_loss, _) in zip(whole, again, plain[1], strict=True):
        assert types == moments
        assert loss == resumed_loss == plain_loss
