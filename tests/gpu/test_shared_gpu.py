"""Several ranks on one GPU under every schedule, against one rank: the first step's gradients, and losses.

NCCL lets ranks share a GPU from 2.30 on; before, the staged backend carries what NCCL would (tests/gpu/staged.py).
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu import trainer
from tests.gpu.device import REHEARSAL
from tests.gpu.trainer import PRECISIONS, Run, model_words

pytestmark = pytest.mark.gpu

STEPS = 2
SHARING_NCCL = (2, 30)
ON_ONE_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "1"}
# Mirrored stages are data-parallel copies: four ranks hold PP2 twice, with experts over two (pairs overlap).
SCHEDULES = {"1f1b": 2, "zb1p": 2, "dualpipe": 4, "dualpipev": 4, "zigzag": 4}
GRADIENT = 2.0**-6  # a few steps of bf16: sums over microbatches and ranks in another order
Record = Callable[[str, object], None]


def carrier(nccl: tuple[int, ...] | None) -> tuple[str, dict[str, str]]:
    """What carries the messages of ranks that share a GPU, and the environment it needs; None: no NCCL."""
    if nccl is not None and nccl >= SHARING_NCCL:
        return f"NCCL {'.'.join(map(str, nccl))}", ON_ONE_GPU
    return "staged", {"DSV3_STAGED": "1"}


def layout(schedule: str) -> list[str]:
    experts = SCHEDULES[schedule] // 2
    words = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", str(experts)]
    return [*words, *(["--pipeline-schedule", schedule] if schedule != "1f1b" else [])]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Run]:
    """The same model on one rank, run once."""
    folder = tmp_path_factory.mktemp("single")
    return functools.cache(lambda: trainer.train(folder, WORDS, steps=STEPS))


WORDS = [*model_words(), *PRECISIONS["bf16"], "--transformer-impl", "local"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule: str, single: Callable[[], Run], tmp_path: Path, record_property: Record) -> None:
    name, env = carrier(None if REHEARSAL else torch.cuda.nccl.version())
    record_property("carried_by", name)
    whole = single()
    run = trainer.train(
        tmp_path, [*WORDS, *layout(schedule)], steps=STEPS, ranks=SCHEDULES[schedule], gpus=1, env=env
    )
    assert run.gradients.keys() == whole.gradients.keys()
    gaps = {name: trainer.distance(run.gradients[name], whole.gradients[name]) for name in whole.gradients}
    worst = max(gaps, key=lambda name: gaps[name])
    difference = trainer.largest_loss_difference(run.losses, whole.losses)
    record_property("largest_loss_difference", f"{difference:.1e}")
    record_property("worst_gradient", f"{gaps[worst]:.1e} ({worst})")
    assert difference < 0.01
    assert gaps[worst] < GRADIENT, worst
