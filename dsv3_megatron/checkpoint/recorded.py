"""What a Megatron checkpoint says of itself, without its tensors: arguments, iteration, schedule of the learning rate.

`torch_dist` checkpoints keep it as one object beside the tensors (before 0.19 in `common.pt`), the older `torch` format
with the tensors of each rank. Pickles are read as plain values; no code of the file is run (`plain_pickle`).
"""

import functools
import io
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dsv3_megatron.checkpoint import plain_pickle

__all__ = ["Recorded", "Unreadable", "read"]

COMMON = "common_state/shard_0_1"  # Megatron's key of what is no tensor


class Unreadable(ValueError):
    """A folder that should be a checkpoint cannot be read; the text says why."""


@dataclass(frozen=True)
class Recorded:
    """A checkpoint's own words.

    Attributes:
        folder: the checkpoint (`…/iter_0000004`).
        iteration: steps done; 0 for a released or converted one.
        args: arguments of the run that saved it; None where it has none.
        scheduler: state of Megatron's `OptimizerParamScheduler`; None where it has none.
        keys: names of everything it holds; empty where the format does not tell without reading all.
    """

    folder: Path
    iteration: int = 0
    args: Namespace | None = None
    scheduler: dict[str, Any] | None = None
    keys: frozenset[str] = field(default_factory=frozenset)

    @property
    def gives_the_model(self) -> bool:
        """Whether runs take their model's sizes from it: it comes from `convert`, or from a run that began so."""
        if self.args is None:
            return False
        return bool(getattr(self.args, "model_from_checkpoint", False)) or not hasattr(
            self.args, "train_iters"
        )

    @property
    def has_optimizer(self) -> bool | None:
        """Whether it holds the optimizer's state; None where that is not known."""
        return any(key.startswith("optimizer.") for key in self.keys) if self.keys else None


def read(folder: Path) -> Recorded:
    """What the checkpoint in `folder` records.

    Raises:
        Unreadable: it is no checkpoint of Megatron's, or cannot be read.
    """
    try:
        changed = max(file.stat().st_mtime_ns for file in (folder, *folder.iterdir()))
        return _read(folder, changed)
    except Unreadable:
        raise
    except Exception as error:  # a pickle that is cut short may raise anything
        raise Unreadable(f"{folder} cannot be read ({type(error).__name__}: {error})") from error


@functools.lru_cache(maxsize=8)
def _read(folder: Path, changed: int) -> Recorded:
    """`changed` is part of the key only: a checkpoint may be written anew."""
    if (folder / ".metadata").is_file():
        return _read_distributed(folder)
    for rank in sorted(folder.glob("mp_rank_*")):
        file = rank / "model_optim_rng.pt"
        if file.is_file():
            return _recorded(folder, _load(str(file), mmap=True), frozenset())
    raise Unreadable(f"{folder} is no checkpoint of Megatron's (neither .metadata nor mp_rank_* is there)")


def _read_distributed(folder: Path) -> Recorded:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import MetadataIndex

    metadata = FileSystemReader(folder).read_metadata()
    keys = frozenset(metadata.state_dict_metadata)
    if (folder / "common.pt").is_file():  # checkpoints of older versions
        return _recorded(folder, _load(str(folder / "common.pt")), keys)
    place = metadata.storage_data.get(MetadataIndex(COMMON))
    if place is None:
        return Recorded(folder, keys=keys)
    with open(folder / place.relative_path, "rb") as file:
        file.seek(place.offset)
        return _recorded(folder, _load(io.BytesIO(file.read(place.length)))[0], keys)


def _load(file: Any, mmap: bool = False) -> Any:
    """`mmap`: the tensors beside what is wanted are not read."""
    import torch

    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=plain_pickle, mmap=mmap)


def _recorded(folder: Path, state: Any, keys: frozenset[str]) -> Recorded:
    if not isinstance(state, dict):
        return Recorded(folder, keys=keys)
    args = state.get("args")
    known = isinstance(args, (Namespace, SimpleNamespace)) and bool(vars(args))
    scheduler = state.get("opt_param_scheduler", state.get("lr_scheduler"))
    return Recorded(
        folder,
        int(state.get("iteration") or 0),
        Namespace(**vars(args)) if known else None,
        scheduler if isinstance(scheduler, dict) else None,
        keys,
    )
