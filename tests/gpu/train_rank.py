"""One rank of a trainer run as the GPU tests start it: the trainer itself, and what a test wants to see of it.

Environment, each optional:
    DSV3_SEE_LOSSES     folder: the loss of each step, rank0.json and so on, of the ranks that know it
    DSV3_SEE_GRADIENTS  folder: the first step's finished gradients by global name, rank0.pt and so on
    DSV3_SEE_WEIGHTS    n:folder: the weights before this process's step n (from 0) by global name, likewise
    DSV3_STAGED         1: NCCL's place is taken by the staged backend (tests/gpu/staged.py)
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    words = sys.argv[1:]
    if "cpu" in words[:2]:  # --device cpu; the stand-ins come before Megatron's first import
        from dsv3_megatron import cpu

        cpu.activate()
    if os.environ.get("DSV3_STAGED") == "1":
        from tests.gpu import staged

        staged.install()
    see_losses = os.environ.get("DSV3_SEE_LOSSES")
    see_gradients, see_weights = os.environ.get("DSV3_SEE_GRADIENTS"), os.environ.get("DSV3_SEE_WEIGHTS")
    from dsv3_megatron import train
    from dsv3_megatron.training import hooks

    if see_losses:
        hooks.after_step(_losses(Path(see_losses)))
    if see_gradients:
        hooks.before_update(_once(0, Path(see_gradients), lambda p: p.main_grad))
    if see_weights:
        number, _, folder = see_weights.partition(":")
        hooks.before_step(_once(int(number), Path(folder), lambda p: p.detach()))
    train.main(words)


def _losses(folder: Path) -> Any:
    """A hook that keeps a file of the main losses so far."""
    losses: list[float] = []

    def hook(call: dict[str, Any], result: Any) -> None:
        if "lm loss" in result[0]:
            losses.append(float(result[0]["lm loss"]))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(losses))

    return hook


def _once(number: int, folder: Path, of: Any) -> Any:
    """A hook that on its call `number` writes {global name: of(parameter)} of this rank's chunks."""
    calls = iter(range(1 << 62))

    def hook(call: dict[str, Any]) -> None:
        if next(calls) != number:
            return
        from dsv3_megatron.specs.names import global_names, unwrap

        model = call["model"]
        found = {}
        for chunk in model if isinstance(model, list) else [model]:
            names = global_names(chunk)
            for local, parameter in unwrap(chunk).named_parameters():
                found[names[local].name] = of(parameter).to("cpu", copy=True)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(found, folder / f"rank{os.environ['RANK']}.pt")

    return hook


if __name__ == "__main__":
    main()
