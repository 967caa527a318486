"""Runs of the trainer for the GPU tests: command lines, and what came out of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.gpu.device import REHEARSAL, sizes
from tests.gpu.processes import run_ranks

GLOBAL_BATCH = 8


def model_words(layers: int = 4, micro_batches: int = GLOBAL_BATCH) -> list[str]:
    """A small DeepSeek-V3 with its head sizes in multiples of 128 (on a GPU), on mock data."""
    small, head = sizes(256, 64), sizes(128, 32)
    return (
        f"--spec dsv3 --num-layers {layers} --hidden-size {small} --ffn-hidden-size {2 * small} "
        f"--num-attention-heads 4 --q-lora-rank {head} --kv-lora-rank {head} --qk-head-dim {head} "
        f"--qk-pos-emb-head-dim {head // 2} --v-head-dim {head} --num-experts 8 --moe-layer-freq "
        f"[0]*1+[1]*{layers - 1} --moe-ffn-hidden-size {sizes(128, 64)} --moe-router-topk 4 "
        "--moe-router-num-groups 4 --moe-router-group-topk 2 --vocab-size 1024 "
        f"--seq-length {sizes(256, 32)} --mock-data --init-method-std 0.02 --micro-batch-size 1 "
        f"--global-batch-size {micro_batches} --eval-iters 0 --lr 1e-3 --log-interval 1 "
        "--clip-grad 0 --allow-deviation clip_grad"
    ).split()


PRECISIONS = {
    "fp32": [],
    "bf16": ["--bf16"],
    "fp8": ["--bf16", "--fp8-recipe", "dsv3"],
}


@dataclass(frozen=True)
class Run:
    """What a run of the trainer left behind: loss of each step, first-step gradients, weights asked for."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(
    folder: Path,
    words: Sequence[str],
    *,
    steps: int,
    on_cpu: bool = False,
    ranks: int = 1,
    gpus: int | None = None,
    weights_before_step: int | None = None,
    env: Mapping[str, str] | None = None,
    limit_s: float = 150,
) -> Run:
    """Train for `steps` steps in all (those of a loaded checkpoint counted in).

    Args:
        on_cpu: the CPU's trainer beside a GPU (in a rehearsal every run is one).
        gpus: that the ranks share; default: one each.
        weights_before_step: of this process, from 0: keep the weights as they are then.

    Raises:
        RanksFailed: a rank failed or hung.
    """
    environment = {"DSV3_SEE_GRADIENTS": str(folder / "gradients"), **(env or {})}
    environment["DSV3_SEE_LOSSES"] = str(folder / "losses")
    if weights_before_step is not None:
        environment["DSV3_SEE_WEIGHTS"] = f"{weights_before_step}:{folder / 'weights'}"
    device = []
    if on_cpu or REHEARSAL:
        device = ["--device", "cpu"]
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": sizes("8", "1")}
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    line = [*device, *words, "--train-iters", str(steps)]
    limit_s *= sizes(1, 3)
    run_ranks("tests.gpu.train_rank", line, ranks, folder / "output", limit_s, environment, gpus)
    losses = [json.loads(path.read_text()) for path in sorted((folder / "losses").iterdir())]
    assert all(of_rank == losses[0] for of_rank in losses), f"ranks tell different losses: {losses}"
    return Run(
        losses[0],
        _merged(folder / "gradients", ranks),
        _merged(folder / "weights", ranks) if weights_before_step is not None else {},
    )


def _merged(folder: Path, ranks: int) -> dict[str, Tensor]:
    """Tensors of all ranks by global name; copies on several ranks are the same, or it is an error."""
    found: dict[str, Tensor] = {}
    for rank in range(ranks):
        for name, tensor in torch.load(folder / f"rank{rank}.pt").items():
            if name in found and not torch.equal(found[name], tensor):
                gap = float((found[name] - tensor).norm() / tensor.norm())
                assert gap < 1e-6, f"copies of {name} differ by {gap:.2e}"
            found[name] = tensor
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def distance_of_all(run: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The same of all tensors as one vector."""
    assert run.keys() == other.keys()
    gaps = sum(float((run[name].double() - other[name].double()).square().sum()) for name in other)
    return (gaps / sum(float(tensor.double().square().sum()) for tensor in other.values())) ** 0.5


def largest_loss_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Relative, over the steps of both, which must be as many."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def worst_gradient(
    run: Mapping[str, Tensor], other: Mapping[str, Tensor], exact: Mapping[str, Tensor], floor: float
) -> tuple[float, str]:
    """How far `run` is from `exact`, in units of how far `other` is (or `floor`, where that is less), at worst."""
    assert run.keys() == other.keys() == exact.keys()
    ratios = {
        name: distance(run[name], exact[name]) / max(distance(other[name], exact[name]), floor)
        for name in exact
    }
    name = max(ratios, key=lambda name: ratios[name])
    return ratios[name], name
