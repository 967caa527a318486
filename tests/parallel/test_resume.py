"""Through the real trainer: 2N steps equal N steps, save, load, N steps, bit for bit (known failure 3)."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.arguments.lines import MICRO
from tests.harness import run_distributed

WORDS = [
    *("--spec", "dsv3", "--device", "cpu", *MICRO),
    *("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"),
    *("--dist-ckpt-optim-fully-reshardable", "--log-interval", "1"),
    *("--lr-decay-iters", "4", "--lr-warmup-iters", "1"),
]


def train(rank: int, world_size: int, words: list[str]) -> dict:
    from dsv3_megatron.train import main

    try:
        return main(words)
    except SystemExit as left:  # how Megatron ends at --exit-interval
        assert not left.code
        return {"exited": True}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint by name: weights, biases, optimizer state, random states.

    "Fully reshardable", since flat optimizer buffers end in uninitialised padding.
    """
    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=dcp.FileSystemReader(checkpoint),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return {name: value for name, value in flatten(state) if isinstance(value, torch.Tensor)}


def flatten(state, prefix=""):
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, (dict, list, tuple)):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (np.ndarray, int)) and "rng_state" in prefix:  # of NumPy and of Python
            yield f"{prefix}{key}", torch.as_tensor(np.asarray(value, dtype=np.int64))
        else:
            yield f"{prefix}{key}", value


def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path) -> None:
    def run(folder: str, *words: str) -> dict:
        return run_distributed(
            train,
            world_size=2,
            timeout=240,
            init=False,
            words=[*WORDS, "--save", str(tmp_path / folder), "--save-interval", "2", *words],
        )[0]

    run("straight", "--train-iters", "4")
    assert run("broken", "--train-iters", "4", "--exit-interval", "2") == {"exited": True}
    resumed = run("broken", "--train-iters", "4", "--load", str(tmp_path / "broken"))
    assert resumed == {"iteration": 4, "consumed_train_samples": 32}
    half = tensors(tmp_path / "broken" / "iter_0000002")
    straight = tensors(tmp_path / "straight" / "iter_0000004")
    broken = tensors(tmp_path / "broken" / "iter_0000004")
    assert straight.keys() == broken.keys() == half.keys()
    assert len(straight) > 50
    for generator in ("torch_rng_state", "np_rng_state", "random_rng_state", "rng_tracker_states"):
        assert any(generator in name for name in straight), generator
    different = {
        name: int((straight[name] != broken[name]).sum())
        for name in straight
        if not torch.equal(straight[name], broken[name])
    }
    assert different == {}
    trained = [name for name in straight if not torch.equal(straight[name], half[name])]
    for part in ("word_embeddings", "expert_bias", "exp_avg_sq", "mtp"):
        assert any(part in name for name in trained), part
