"""The trainer's average: exact, saved, resumed, loaded in another layout, evaluated and exported."""

from pathlib import Path
from typing import Any

import torch

from tests.arguments.lines import MICRO
from tests.harness import run_distributed
from tests.parallel.test_resume import tensors

DECAY = 0.75
WORDS = ["--spec", "dsv3", "--device", "cpu", *MICRO, "--use-distributed-optimizer", "--log-interval", "1000"]
WORDS += ["--lr-decay-iters", "4", "--lr-warmup-iters", "1", "--dist-ckpt-optim-fully-reshardable"]
DUALPIPE = ["--pipeline-schedule", "dualpipe", "--pipeline-model-parallel-size", "2"]


def train(rank: int, world_size: int, words: list[str]) -> dict[str, Any]:
    """Train; the average at the end, and the same computed step by step on the training thread."""
    from dsv3_megatron import train
    from dsv3_megatron.ema import trainer
    from dsv3_megatron.ema.checkpoint import named_parameters
    from dsv3_megatron.training import hooks

    expected: dict[str, torch.Tensor] = {}
    seen: dict[str, Any] = {}

    def start(call: dict[str, Any]) -> None:
        if not expected:
            seen.update(named_parameters(call["model"]))
            loaded = trainer.average()
            values = seen if loaded is None else loaded.average
            expected.update({name: p.detach().float().clone() for name, p in values.items()})

    def follow(call: dict[str, Any], result: Any) -> None:
        for name, p in seen.items():
            expected[name].lerp_(p.detach().float(), 1 - DECAY)

    hooks.before_step(start)
    hooks.after_step(follow)
    try:
        train.main(words)
    except SystemExit as left:  # how Megatron ends at --exit-interval and after a conversion
        assert not left.code
    average = trainer.average()
    if average is None:
        return {}
    average.wait()
    weights = {name: p.detach().clone() for name, p in seen.items()}
    return {"average": dict(average.average), "expected": expected, "weights": weights}


def run(world_size: int, *words: str) -> list[dict[str, Any]]:
    return run_distributed(train, world_size, timeout=400, init=False, words=[*WORDS, *words])


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_checkpoint(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors(folder).items() if n.startswith(prefix)}


def test_exact_saved_resumed_and_exported(tmp_path) -> None:
    keep = [
        "--ema-decay",
        str(DECAY),
        "--save",
        str(tmp_path / "a"),
        "--save-interval",
        "2",
        "--train-iters",
        "4",
    ]
    straight = run(2, *DUALPIPE, *keep)
    for rank in straight:
        assert equal(rank["average"], rank["expected"])
        assert not equal(rank["average"], {n: w.float() for n, w in rank["weights"].items()})
    # Every weight of the model, experts included, has its average in the checkpoint.
    saved = in_checkpoint(tmp_path / "a" / "iter_0000004", "ema.")
    moments = in_checkpoint(tmp_path / "a" / "iter_0000004", "optimizer.state.exp_avg.")
    assert saved.keys() == moments.keys() and len(saved) > 50

    resumed = run(2, *DUALPIPE, *keep, "--load", str(tmp_path / "a"), "--ckpt-step", "2")
    for rank, before in zip(resumed, straight, strict=True):
        assert equal(rank["average"], rank["expected"]) and equal(rank["average"], before["average"])

    # Another layout loads it, and writes it as the weights of a checkpoint.
    convert = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", str(tmp_path / "b")]
    run(1, "--load", str(tmp_path / "a"), "--eval-ema", "--skip-train", "--no-load-optim", *convert)
    (folder,) = (tmp_path / "b" / "torch_dist").glob("iter_*")
    exported = tensors(folder)
    for name, value in saved.items():
        assert torch.equal(exported[name], value), name
