"""Two-hop dispatch and experts that move, on 2, 4 and 8 GPUs: losses of alltoall with fixed experts."""

from pathlib import Path

import pytest

from tests.gpu import test_trainer
from tests.gpu.device import needs_gpus
from tests.gpu.test_trainer import Record, compare
from tests.gpu.trainer import GLOBAL_BATCH, Run, largest_loss_difference

pytestmark = pytest.mark.gpu

LAYOUTS = {
    2: ["--expert-model-parallel-size", "2"],
    4: ["--expert-model-parallel-size", "4"],
    8: [
        "--expert-model-parallel-size",
        "4",
        "--pipeline-model-parallel-size",
        "2",
        "--pipeline-schedule",
        "dualpipe",
    ],
}
# In fp32: the sums of two hops round otherwise, and in bf16 that sends tokens to other experts.
GRADIENT = 2.0**-12
BALANCED = ["--expert-placement", "balanced", "--expert-placement-interval", "2"]


def train(folder: Path, num_gpus: int, *words: str, precision: str = "bf16") -> Run:
    """With two microbatches for each pipeline rank on every replica, which DualPipe needs."""
    batch = max(GLOBAL_BATCH, 2 * num_gpus)
    return test_trainer.train(
        folder, "local", num_gpus, *LAYOUTS[num_gpus], *words, batch=batch, precision=precision
    )


def two_hop(num_gpus: int) -> list[str]:
    """Two nodes, as far as the dispatcher knows."""
    return ["--moe-token-dispatcher-type", "two_hop", "--moe-node-size", str(1 if num_gpus == 2 else 2)]


@pytest.mark.parametrize("num_gpus", LAYOUTS)
def test_two_hop(num_gpus: int, tmp_path: Path, record_property: Record) -> None:
    needs_gpus(num_gpus)
    plain = train(tmp_path / "alltoall", num_gpus, precision="fp32")
    ours = train(tmp_path / "two_hop", num_gpus, *two_hop(num_gpus), precision="fp32")
    again = train(tmp_path / "again", num_gpus, *two_hop(num_gpus), precision="fp32")
    record_property("same_bits_when_run_again", ours.losses == again.losses)
    compare(ours, plain, record_property, GRADIENT)


@pytest.mark.parametrize("num_gpus", LAYOUTS)
def test_balanced(num_gpus: int, tmp_path: Path, record_property: Record) -> None:
    needs_gpus(num_gpus)
    fixed = train(tmp_path / "fixed", num_gpus)
    moved = train(tmp_path / "balanced", num_gpus, *BALANCED)
    worst = largest_loss_difference(moved.losses, fixed.losses)
    record_property("largest_relative_difference", f"{worst:.2e}")
    assert worst < 1e-3
