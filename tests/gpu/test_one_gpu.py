"""The trainer on one GPU against the CPU's: losses, the first step's gradients, and a checkpoint that both read.

The yardstick is the CPU in fp32: a GPU's gradient in bf16 or FP8 may be at most `FACTOR` times as far from it as the
CPU's own in the same precision. Losses alone would hide a lost microbatch; that this yardstick does not is tested.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu import trainer
from tests.gpu.device import sizes
from tests.gpu.trainer import PRECISIONS, Run, model_words

pytestmark = pytest.mark.gpu

STEPS = 4
LAYERS, BATCH = sizes((4, 8), (2, 4))
SAVED = 2
FACTOR = 3.0
FLOOR = {"bf16": 2.0**-9, "fp8": 2.0**-5}  # half a step of bf16; a step of E4M3
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`run(precision, on_cpu, micro_batches)`, each run once."""
    folder = tmp_path_factory.mktemp("one_gpu")

    @functools.cache
    def once(precision: str, on_cpu: bool, micro_batches: int = BATCH) -> Run:
        words = [*model_words(LAYERS, micro_batches), *PRECISIONS[precision], *LOCAL]
        where = folder / f"{precision}-{'cpu' if on_cpu else 'gpu'}-{micro_batches}"
        steps = 1 if precision == "fp32" or micro_batches != BATCH else STEPS
        return trainer.train(where, words, steps=steps, on_cpu=on_cpu)

    return once


LOCAL = ["--transformer-impl", "local"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_losses_and_first_gradients(precision: str, run: Callable[..., Run], record_property: Record) -> None:
    exact = run("fp32", True)
    cpu, gpu = run(precision, True), run(precision, False)
    ratio, name = trainer.worst_gradient(gpu.gradients, cpu.gradients, exact.gradients, FLOOR[precision])
    difference = trainer.largest_loss_difference(gpu.losses, cpu.losses)
    record_property("precision", precision)
    record_property("losses", f"{gpu.losses[0]:.5f} ... {gpu.losses[-1]:.5f}")
    record_property("largest_loss_difference", f"{difference:.1e}")
    record_property("worst_gradient", f"{ratio:.2f} of the CPU's error ({name})")
    assert len(gpu.losses) == STEPS and gpu.losses[-1] < gpu.losses[0]
    assert gpu.losses[0] == pytest.approx(exact.losses[0], rel=1e-3)
    assert difference < 0.01
    assert ratio < FACTOR, name


def test_a_lost_microbatch_is_seen(run: Callable[..., Run], record_property: Record) -> None:
    """The control: with one microbatch less the same comparison must fail."""
    exact, cpu = run("fp32", True), run("bf16", True)
    lost = run("bf16", False, BATCH - 1)
    ratio, name = trainer.worst_gradient(lost.gradients, cpu.gradients, exact.gradients, FLOOR["bf16"])
    record_property("lost_microbatch", f"{ratio:.1f} of the CPU's error ({name})")
    assert ratio > FACTOR


def test_checkpoint_saved_here_and_loaded_on_cpu(tmp_path: Path, record_property: Record) -> None:
    """The weights are the same bits, and training goes on as it does here."""
    words = [*model_words(LAYERS, BATCH), *PRECISIONS["bf16"], *LOCAL, "--use-distributed-optimizer"]
    checkpoint = ["--ckpt-format", "torch_dist", "--save-interval", str(SAVED)]
    saved = trainer.train(
        tmp_path / "gpu",
        [*words, *checkpoint, "--save", str(tmp_path / "saved")],
        steps=2 * SAVED,
        weights_before_step=SAVED,
    )
    iteration = tmp_path / "saved" / "latest_checkpointed_iteration.txt"
    iteration.write_text(str(SAVED))  # the last one is of the end
    loaded = trainer.train(
        tmp_path / "cpu",
        [*words, "--load", str(tmp_path / "saved")],
        steps=2 * SAVED,
        on_cpu=True,
        weights_before_step=0,
    )
    assert saved.weights.keys() == loaded.weights.keys()
    differing = [
        name for name, weight in saved.weights.items() if not torch.equal(weight, loaded.weights[name])
    ]
    difference = trainer.largest_loss_difference(loaded.losses, saved.losses[SAVED:])
    record_property(
        "after_loading", f"{len(saved.weights)} weights bit-equal, losses within {difference:.1e}"
    )
    assert not differing
    assert difference < 0.01
