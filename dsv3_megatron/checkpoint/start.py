"""Which checkpoint a run begins with, as Megatron chooses it, and what it takes from there.

--load DIR                    the newest complete checkpoint of DIR: the run goes on from it
--load DIR --finetune         its weights only: steps, samples and schedules begin anew
--pretrained-checkpoint DIR   the same, where --load has none yet
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.recorded import Recorded, Unreadable, read
from dsv3_megatron.resilience import checkpoints

__all__ = ["RELEASE", "Start", "begins_where_it_saves", "has_checkpoint", "start_of"]

RELEASE = "release"
NON_PERSISTENT = "non_persistent"  # Megatron's folder in --load for checkpoints that replace each other


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        option: the option that names the folder.
        root: the folder.
        recorded: the checkpoint's own words; None where `problem` says why there are none.
        goes_on: steps, samples and schedules go on from the checkpoint's.
        problem: why there is nothing to begin with, in words for the user.
    """

    option: str
    root: Path
    recorded: Recorded | None = None
    goes_on: bool = False
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.option} {self.root}"


def has_checkpoint(root: Any) -> bool:
    """Whether Megatron would look for a checkpoint in a folder: its tracker file is there."""
    return root is not None and (Path(root) / checkpoints.TRACKER).is_file()


def begins_where_it_saves(args: Namespace) -> bool:
    """Whether `--load` is the folder of `--save`, which a first start finds empty."""
    load, save = getattr(args, "load", None), getattr(args, "save", None)
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()


def start_of(args: Namespace) -> Start | None:
    """Where a run with these arguments begins (some may still be absent); None for random weights."""
    load, pretrained = getattr(args, "load", None), getattr(args, "pretrained_checkpoint", None)
    finetune = bool(getattr(args, "finetune", False))
    if pretrained is not None and not has_checkpoint(load):
        return _start("--pretrained-checkpoint", pretrained, args, goes_on=False)
    if load is None:
        return None
    return _start("--load", load, args, goes_on=not finetune)


def _start(option: str, root: str, args: Namespace, goes_on: bool) -> Start | None:
    path = Path(root)
    newer = _non_persistent(args, path) if option == "--load" else None
    if not has_checkpoint(path) and getattr(args, "ckpt_step", None) is None and newer is None:
        return None
    try:
        folder = newer or _folder(path, args)
        recorded = read(folder)
    except (checkpoints.NoCompleteCheckpoint, Unreadable) as error:
        return Start(option, path, problem=str(error))
    return Start(option, path, recorded, goes_on and folder.name != RELEASE)


def _folder(root: Path, args: Namespace) -> Path:
    """The checkpoint that will be loaded from a folder of `--save`, of either format."""
    step = getattr(args, "ckpt_step", None)
    if has_checkpoint(root) and (root / checkpoints.TRACKER).read_text().strip() == RELEASE:
        if step is not None:
            raise Unreadable(f"--ckpt-step {step}: {root} holds a release, which has no steps. Leave it out")
        return root / RELEASE
    number = step if step is not None else checkpoints.named_iteration(root)
    if number is not None and list(checkpoints.folder_of(root, number).glob("mp_rank_*")):
        return checkpoints.folder_of(root, number)  # the older format has no mark of completeness
    if step is not None:
        return checkpoints.at_step(root, step)
    return checkpoints.to_be_loaded(root, recovers=begins_where_it_saves(args))


def _non_persistent(args: Namespace, load: Path) -> Path | None:
    """The checkpoint of `--non-persistent-ckpt-type global` where it is not older than those of `--load`."""
    if getattr(args, "non_persistent_ckpt_type", None) != "global":
        return None
    root = Path(getattr(args, "non_persistent_global_ckpt_dir", None) or load / NON_PERSISTENT)
    if not has_checkpoint(root):
        return None
    kept, persistent = checkpoints.complete_iterations(root), checkpoints.complete_iterations(load)
    if not kept or max(kept) < max(persistent, default=0):
        return None
    return checkpoints.folder_of(root, max(kept))
