"""Converted checkpoints in the trainer: any layout and schedule loads them, and what it trains converts back."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_megatron.convert.__main__ import command_line
from dsv3_megatron.convert.hf_directory import HFDirectory
from dsv3_megatron.convert.hf_names import to_hf
from dsv3_megatron.convert.logits import of_transformers
from dsv3_megatron.convert.to_hf import MegatronWeights, megatron_to_hf
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.demo.heldout import Windows
from tests.arguments.lines import whole_mock_data
from tests.convert.releases import micro, release
from tests.convert.v3 import V3
from tests.harness import run_distributed
from tests.specs.models import build, micro_config

SEQ = 32
RUN = (
    f"--spec dsv3 --device cpu --mock-data --seq-length {SEQ} --micro-batch-size 1 --global-batch-size 8 --lr 3e-3 "
    "--num-workers 0 --init-method-std 0.02 --eval-iters 1 --log-interval 1 --lr-warmup-iters 1 "
    "--use-distributed-optimizer"
).split()
_TOKENS = np.random.default_rng(5).integers(0, 90, (8, SEQ + 1))
WINDOWS = Windows(_TOKENS[:, :-1], _TOKENS[:, 1:], np.ones((8, SEQ), np.float32))


@dataclass(frozen=True)
class Layout:
    """A schedule and sizes of groups, for `world_size` ranks."""

    schedule: str
    pp: int = 1
    ep: int = 1
    tp: int = 1
    world_size: int = 2

    def words(self) -> list[str]:
        words = ["--pipeline-schedule", self.schedule, "--pipeline-model-parallel-size", str(self.pp)]
        words += ["--expert-model-parallel-size", str(self.ep), "--tensor-model-parallel-size", str(self.tp)]
        return words + (["--sequence-parallel"] if self.tp > 1 else [])


def train_and_evaluate(rank: int, world_size: int, words: list[str]) -> float | None:
    """The trainer's own loss of `WINDOWS` at the end, on the ranks that have it."""
    from dsv3_megatron.demo.evaluate import mean_loss
    from dsv3_megatron.train import main

    whole_mock_data()  # how much is learned in a few steps is known of these samples
    losses: list[float | None] = []
    main(words, non_loss_data_func=lambda model: losses.append(mean_loss(model, WINDOWS)))
    return losses[-1]


def evaluated(layout: Layout, checkpoint: Path, *words: str, timeout: float = 400) -> float:
    model = shlex.split(command_line(MegatronWeights(checkpoint).architecture.arguments()))
    given = [*RUN, *model, *layout.words(), "--load", str(checkpoint), *words]
    losses = run_distributed(
        train_and_evaluate, world_size=layout.world_size, timeout=timeout, init=False, words=given
    )
    found = {loss for loss in losses if loss is not None}
    assert len(found) == 1
    return found.pop()


def loss_of(logits: Tensor) -> float:
    """logits [n, s, vocabulary] → mean cross entropy of `WINDOWS`."""
    return float(F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(WINDOWS.labels).flatten()))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    release(folder / "hf", micro(num_hidden_layers=4), mtp=True)
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder


@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        (Layout("dualpipe", pp=2), 5),
        pytest.param(Layout("dualpipe", pp=2, ep=2, world_size=4), 20, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_goes_on_under_dualpipe_and_converts_back(
    layout: Layout, steps: int, converted: Path, tmp_path: Path
) -> None:
    """Some steps; then transformers has the trainer's loss of the same windows."""
    source = HFDirectory(converted / "hf")
    tokens = [torch.from_numpy(WINDOWS.tokens)]
    before = loss_of(of_transformers(source, tokens)[0])
    save = ["--train-iters", str(steps), "--save", str(tmp_path / "trained"), "--save-interval", str(steps)]
    trained = evaluated(layout, converted / "megatron", *save)
    megatron_to_hf(tmp_path / "trained", tmp_path / "back", hf_files=converted / "megatron" / "hf")
    back = HFDirectory(tmp_path / "back")
    assert loss_of(of_transformers(back, tokens)[0]) == pytest.approx(trained, abs=1e-5)
    assert abs(trained - before) > 0.05
    # Every expert and the MTP layer came along, each trained by itself.
    assert back.architecture == source.architecture
    unchanged = [n for n in source.weights if torch.equal(source.stored(n), back.stored(n))]
    assert unchanged == []
    experts = [back.stored(n) for n in back.weights if ".experts." in n and n.endswith("up_proj.weight")]
    assert len({tensor.numpy().tobytes() for tensor in experts}) == len(experts) == 4 * 8


LAYOUTS = [
    Layout("1f1b", world_size=1),
    Layout("1f1b", tp=2),
    Layout("1f1b", pp=2, ep=2, world_size=4),
    Layout("zb1p", pp=2),
    Layout("dualpipe", pp=2),
    Layout("dualpipe", pp=4, world_size=4),
    Layout("dualpipev", pp=2, ep=2, world_size=4),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_and_schedule_evaluates_as_v3(layout: Layout, converted: Path) -> None:
    source = HFDirectory(converted / "hf")
    reference = V3(source.config, {name: source.stored(name) for name in [*source.weights, *source.copies]})
    expected = loss_of(torch.stack([reference.logits(torch.from_numpy(row)) for row in WINDOWS.tokens]))
    got = evaluated(layout, converted / "megatron", "--train-iters", "1", "--skip-train")
    assert got == pytest.approx(expected, abs=1e-5)


GROUPS: list[dict[str, Any]] = [
    {"expert_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
]


def load_in_every_layout(rank: int, world_size: int, checkpoint: str, hf: str) -> set[str]:
    """Names of the released tensors of which this rank has compared its part."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from dsv3_megatron.specs.names import global_names, named_weights

    source = HFDirectory(Path(hf))
    compared: set[str] = set()
    for groups in GROUPS:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**{n: v for n, v in groups.items() if n.endswith("_size")})
        model_parallel_cuda_manual_seed(7)
        model = build(micro_config(num_layers=4, moe_layer_freq=[0, 1, 1, 1], mtp_num_layers=1, **groups))
        wanted = {"model": model.sharded_state_dict()}
        model.load_state_dict(dist_checkpointing.load(wanted, checkpoint)["model"])
        names = global_names(model)
        for local, weight in named_weights(model).items():
            released = to_hf(names[local].name, 4)
            full = torch.cat([source.stored(part) for part in released])
            assert torch.equal(weight, names[local].shard.take(full)), (groups, local)
            compared.update(released)
    return compared


def test_weights_are_equal_in_every_layout(converted: Path) -> None:
    folders: dict[str, Any] = {
        "checkpoint": str(converted / "megatron" / "release"),
        "hf": str(converted / "hf"),
    }
    compared = run_distributed(load_in_every_layout, world_size=2, **folders)
    assert set().union(*compared) == set(HFDirectory(converted / "hf").weights)
