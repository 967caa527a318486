"""Which checkpoints of a folder are complete, and which one a run goes on from.

Megatron writes the data of a checkpoint first and `metadata.json` last, then names the iteration in a tracker file. A
rank that is killed on the way leaves a folder without the mark, or a tracker that names nothing; neither may be loaded.
"""

import json
import shutil
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
MARK = "metadata.json"
REPLACED = ".replaced"  # suffix of a checkpoint that is being written anew


class NoCompleteCheckpoint(RuntimeError):
    """A folder was to be loaded from, and none of its checkpoints is complete."""


def folder_of(root: Path, iteration: int) -> Path:
    """Megatron's folder of a checkpoint."""
    return root / f"iter_{iteration:07d}"


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a whole torch_dist checkpoint: marked as finished, and no data is missing or cut short."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        json.loads((checkpoint / MARK).read_text())
        entries = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    except Exception:  # reading a pickle that was cut short may raise anything
        return False
    needed: dict[str, int] = {}
    for entry in entries:
        end = entry.offset + entry.length
        needed[entry.relative_path] = max(end, needed.get(entry.relative_path, 0))
    return all(_size(checkpoint / name) >= size for name, size in needed.items())


def complete_iterations(root: Path) -> list[int]:
    """Iterations of all complete checkpoints in `root`, in the order in which they were finished."""
    finished = [
        folder for folder in root.glob("iter_*") if _iteration(folder) is not None and is_complete(folder)
    ]
    finished.sort(key=lambda folder: ((folder / MARK).stat().st_mtime_ns, folder.name))
    return [int(folder.name.removeprefix("iter_")) for folder in finished]


def iteration_to_load(root: Path) -> int:
    """The iteration that the tracker names if that checkpoint is complete, else the one that was finished last.

    Raises:
        NoCompleteCheckpoint: there is none.
    """
    named = named_iteration(root)
    if named is not None and is_complete(folder_of(root, named)):
        return named
    complete = complete_iterations(root)
    if not complete:
        raise NoCompleteCheckpoint(
            f"--load {root}: no checkpoint there is complete; a run was ended while it saved its first one. Remove the "
            "folder to begin anew, or load another one"
        )
    return complete[-1]


def named_iteration(root: Path) -> int | None:
    """The iteration in the tracker; None where it is missing, was cut short, or names a release."""
    try:
        return int((root / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def at_step(root: Path, iteration: int) -> Path:
    """The complete checkpoint of an iteration.

    Raises:
        NoCompleteCheckpoint: it is not there, or not complete; the text names those that are.
    """
    if is_complete(folder_of(root, iteration)):
        return folder_of(root, iteration)
    raise NoCompleteCheckpoint(
        f"--ckpt-step {iteration}: not a complete checkpoint of {root}. Use one of "
        f"{sorted(complete_iterations(root))}"
    )


def to_be_loaded(root: Path, recovers: bool) -> Path:
    """The checkpoint that a run will load from `root`; nothing is changed.

    Args:
        recovers: the run saves in `root`, so that it first settles what a killed run left there (`recover`).

    Raises:
        NoCompleteCheckpoint: there is none.
    """
    named = named_iteration(root)
    if recovers and named is not None and not is_complete(folder_of(root, named)):
        former = _former(folder_of(root, named))
        if is_complete(former):
            return former
    return folder_of(root, iteration_to_load(root))


def begin(root: Path, iteration: int) -> None:
    """Make way for a checkpoint: what an interrupted save left goes, a complete one stays aside until it is settled.

    This, `settle` and `recover` are for one rank of the job that saves in `root`.
    """
    target = folder_of(root, iteration)
    settle(target)
    if is_complete(target):
        target.rename(_former(target))
    elif target.is_dir():
        shutil.rmtree(target)


def settle(target: Path) -> None:
    """If a checkpoint was written anew, keep the new one if it is complete, the former one otherwise."""
    former = _former(target)
    if not former.is_dir():
        return
    if is_complete(target):
        shutil.rmtree(former)
    else:
        shutil.rmtree(target, ignore_errors=True)
        former.rename(target)


def recover(root: Path) -> None:
    """Settle what a run that was killed left; nothing may be under way in `root`."""
    for former in root.glob("iter_*" + REPLACED):
        settle(former.with_name(former.name.removesuffix(REPLACED)))


def _former(target: Path) -> Path:
    return target.with_name(target.name + REPLACED)


def _iteration(folder: Path) -> int | None:
    text = folder.name.removeprefix("iter_")
    return int(text) if text.isdigit() else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
