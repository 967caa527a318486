"""pytest plugin: the GPU tests that train, on an imagined machine of eight GPUs whose runs are only written down.

The tests' own code runs: what they put together, and what they read of a run. Where a process group would be started,
its command line goes to a file instead, and plain losses and gradients are left where a run leaves them.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import trainer

GPUS = 8
NCCL = (2, 28, 9)  # too old for ranks that share a GPU
PRESENT = ("deep_ep", "transformer_engine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="file for the command lines, one JSON object each")


@pytest.fixture(autouse=True)
def imagined(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Replaced in each test."""
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: NCCL)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name in PRESENT or find(name, *rest))
    file, test = request.config.getoption("--lines"), request.node.nodeid

    def run_ranks(
        module: str,
        words: Sequence[str],
        num_ranks: int,
        folder: Path,
        limit_s: float,
        env: Mapping[str, str],
        num_gpus: int | None = None,
    ) -> None:
        importlib.import_module(module)
        line = {"test": test, "words": list(words), "ranks": num_ranks, "gpus": num_gpus, "env": dict(env)}
        with open(file, "a") as lines:
            lines.write(json.dumps(line) + "\n")
        leave(words, num_ranks, env)

    monkeypatch.setattr(trainer, "run_ranks", run_ranks)


def leave(words: Sequence[str], num_ranks: int, env: Mapping[str, str]) -> None:
    """What a run leaves: losses that fall, gradients that are as large as the batch, weights, a checkpoint's folder."""
    steps = range(int(after(words, "--train-iters")))
    losses = [5 - step / 100 for step in steps]
    if "--load" in words:
        losses = losses[len(losses) // 2 :]
    if "--save" in words:
        Path(after(words, "--save")).mkdir()
    folders = {"DSV3_SEE_LOSSES": losses, "DSV3_SEE_GRADIENTS": float(after(words, "--global-batch-size"))}
    folders["DSV3_SEE_WEIGHTS"] = 1.0
    for name, value in folders.items():
        if name not in env:
            continue
        folder = Path(env[name].rpartition(":")[2])
        folder.mkdir(parents=True)
        for rank in range(num_ranks):
            write(folder / f"rank{rank}", value)


def write(path: Path, value: Any) -> None:
    """Losses as JSON, else a tensor by a parameter's name."""
    if isinstance(value, list):
        path.with_suffix(".json").write_text(json.dumps(value))
    else:
        torch.save({"weight": torch.full((4,), value)}, path.with_suffix(".pt"))


def after(words: Sequence[str], option: str) -> str:
    """The option's value."""
    return words[len(words) - 1 - list(reversed(words)).index(option) + 1]
