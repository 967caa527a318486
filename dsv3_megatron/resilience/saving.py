"""Around Megatron's save and load: one whole checkpoint is there at any time, and only whole ones are loaded."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.resilience import checkpoints, save_path, watch
from dsv3_megatron.training import hooks


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the text says why, and which one is still there."""


def around_save(original: Callable[..., Any], call: dict[str, Any]) -> Any:
    """`save_checkpoint` with its arguments by name (patch `save_checkpoint`)."""
    from megatron.training import get_args

    args = get_args()
    iteration = call["iteration"]
    watch.note(f"saving the checkpoint of iteration {iteration}")
    if args.ckpt_format != "torch_dist" or call["non_persistent_ckpt"]:
        return original(**call)
    root = Path(args.save)
    try:
        _on_rank_0(lambda: checkpoints.begin(root, iteration))
        result = original(**call)
        if not args.async_save:
            _on_rank_0(lambda: checkpoints.settle(checkpoints.folder_of(root, iteration)))
    except (OSError, CheckpointException) as error:
        cause = _write_error(error, root)
        complete = checkpoints.complete_iterations(root)
        raise SaveFailed(
            f"the checkpoint of iteration {iteration} could not be written to --save {root}: {cause}. "
            + (f"Complete there: iteration {complete[-1]}" if complete else "No other checkpoint is there")
            + "; the same command goes on from it once there is room to write"
        ) from error
    watch.note(f"after the checkpoint of iteration {iteration}")
    return result


def iteration_to_load(tracker_file: str) -> tuple[int, bool]:
    """What Megatron's `read_metadata` returns (iteration, whether a release), of a complete checkpoint.

    Raises:
        NoCompleteCheckpoint: on all ranks.
    """
    from megatron.training import get_args

    tracker, args = Path(tracker_file), get_args()
    if tracker.read_text().strip() == "release":
        return 0, True
    return _on_rank_0(lambda: _complete_iteration(tracker, args)), False


def _complete_iteration(tracker: Path, args: Any) -> int:
    root = tracker.parent
    if args.save and Path(args.save).resolve() == root.resolve():
        checkpoints.recover(root)
    if args.ckpt_step:
        checkpoints.at_step(root, args.ckpt_step)
        return args.ckpt_step
    iteration = checkpoints.iteration_to_load(root)
    if tracker.read_text().strip() != str(iteration):
        print(f"> {tracker} names no complete checkpoint: loading iteration {iteration}", flush=True)
    return iteration


def load_newest(model: list[Any], optimizer: Any) -> None:
    """Weights, moments and biases of the newest checkpoint of `--save`; counters, data and schedules stay.

    Raises:
        NoCompleteCheckpoint, FileNotFoundError: there is none.
    """
    from megatron.core.num_microbatches_calculator import update_num_microbatches
    from megatron.training import get_args
    from megatron.training.checkpointing import checkpoint_exists, load_checkpoint

    args = get_args()
    if not checkpoint_exists(args.save):
        raise checkpoints.NoCompleteCheckpoint(
            f"--on-bad-step rewind: there is no checkpoint in --save {args.save} to go back to yet"
        )
    counters = ("iteration", "consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")
    kept = {name: getattr(args, name) for name in (*counters, "ckpt_step", "no_load_rng", "finetune")}
    args.ckpt_step, args.no_load_rng, args.finetune = None, True, False
    try:
        with hooks.checkpoint({"model": model, "optimizer": optimizer}):
            iteration, _ = load_checkpoint(model, optimizer, None, load_arg="save")
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
        update_num_microbatches(args.consumed_train_samples)
    if dist.get_rank() == 0:
        print(f"[guard] weights, moments and biases are those of iteration {iteration} again", flush=True)


def by_name(original: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Turns a call's arguments into a dict by name, defaults included."""
    signature = inspect.signature(original)

    def bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return dict(call.arguments)

    return bind


def _on_rank_0(action: Callable[[], Any]) -> Any:
    """What `action` returns or raises on rank 0, on all ranks."""
    answer: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = [action()]
        except (OSError, checkpoints.NoCompleteCheckpoint) as error:
            answer = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _write_error(error: OSError | CheckpointException, root: Path) -> str:
    """The system's words. Megatron's writers keep only the kind of an error, so each rank tries to write once more."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    mine: str | None = None
    try:
        save_path.check(root, dist.get_rank())
    except RefusedArgument as refused:
        assert isinstance(refused.__cause__, OSError)
        mine = f"{refused.__cause__.strerror} (rank {dist.get_rank()})"
    everyones: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)  # a failed write is raised on all ranks
    return "; ".join(text for text in everyones if text) or str(error)
