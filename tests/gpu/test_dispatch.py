"""Two-hop dispatch and experts that move, on 2, 4 and 8 GPUs: losses of alltoall with fixed experts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.test_trainer import _needs, losses

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
BALANCED = ["--expert-placement", "balanced", "--expert-placement-interval", "5"]


def two_hop(num_gpus: int) -> list[str]:
    """Two nodes, as far as the dispatcher knows."""
    return ["--moe-token-dispatcher-type", "two_hop", "--moe-node-size", str(1 if num_gpus == 2 else 2)]


@pytest.mark.parametrize("num_gpus", LAYOUTS)
def test_two_hop(num_gpus: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    _needs(num_gpus)
    words = LAYOUTS[num_gpus]
    plain = losses(num_gpus, "local", tmp_path / "alltoall", *words)
    ours = losses(num_gpus, "local", tmp_path / "two_hop", *words, *two_hop(num_gpus))
    again = losses(num_gpus, "local", tmp_path / "again", *words, *two_hop(num_gpus))
    worst = max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))
    record_property("largest_relative_difference", f"{worst:.2e}")
    record_property("same_bits_when_run_again", ours == again)
    assert ours[0] == pytest.approx(plain[0], rel=1e-4) and worst < 0.01


@pytest.mark.parametrize("num_gpus", LAYOUTS)
def test_balanced(num_gpus: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    _needs(num_gpus)
    words = LAYOUTS[num_gpus]
    fixed = losses(num_gpus, "local", tmp_path / "fixed", *words)
    moved = losses(num_gpus, "local", tmp_path / "balanced", *words, *BALANCED)
    worst = max(abs(a - b) / b for a, b in zip(moved, fixed, strict=True))
    record_property("largest_relative_difference", f"{worst:.2e}")
    assert worst < 1e-3
