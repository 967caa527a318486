"""Checkpoints without tensors: what Megatron's say of themselves, made in milliseconds."""

import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from dsv3_megatron.arguments.command_line import parse, parse_given
from dsv3_megatron.arguments.complete import missing_words
from dsv3_megatron.checkpoint.schedule import planned
from tests.arguments.lines import MICRO


def arguments(parser: Any, words: str = "", line: list[str] = MICRO) -> Namespace:
    """What a trainer would record of the micro model's run with these words more (not validated by Megatron)."""
    given = [*line, *words.split()]
    return parse(parser, given + missing_words(parse_given(parser, given)))


def write(
    root: Path, args: Namespace | None, iteration: int = 4, release: bool = False, **state: Any
) -> Path:
    """A folder for `--load`, with one complete checkpoint."""
    folder = root / ("release" if release else f"iter_{iteration:07d}")
    folder.mkdir(parents=True)
    common: dict[str, Any] = {"iteration": iteration, "checkpoint_version": 3.0, **state}
    if args is not None:
        common["args"] = args
        if "opt_param_scheduler" not in state and hasattr(args, "micro_batch_size"):
            common["opt_param_scheduler"] = {**(planned(args, 8) or {}), "num_steps": iteration * 8}
    torch.save(common, folder / "common.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (root / "latest_checkpointed_iteration.txt").write_text("release" if release else str(iteration))
    return root
