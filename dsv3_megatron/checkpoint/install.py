"""What a run does to begin with a checkpoint, beside Megatron's own loading, and whether the machine has the memory."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dsv3_megatron.checkpoint import host_memory
from dsv3_megatron.checkpoint.schedule import planned, reads_schedule
from dsv3_megatron.checkpoint.start import start_of
from dsv3_megatron.errors import RefusedArgument

__all__ = ["install"]


def install() -> None:
    """Follow `--checkpoint-changes` and the options of the learning-rate schedule in this process. Idempotent.

    Raises:
        dsv3_megatron.patching.PatchMismatch: this Megatron version differs from the patches' expectation.
    """
    from dsv3_megatron.training import hooks

    hooks.while_loading(_with_room_in_memory)
    hooks.before_step(_before_first_step)
    hooks.while_loading(_without_new_mtp_layers)
    hooks.after_load(_load_schedule)


@contextmanager
def _with_room_in_memory(call: dict[str, Any]) -> Iterator[None]:
    _check_memory(call["ddp_model"])
    yield


def _before_first_step(call: dict[str, Any]) -> None:
    """A run that loads nothing has to save all the same."""
    from megatron.training import get_args

    if call["iteration"] == get_args().iteration:
        _check_memory(call["model"])


def _check_memory(model: list[Any]) -> None:
    """Refuse, on every rank, a checkpoint that the machine of any rank has no room to load or to save.

    The kernel would kill the ranks hours later, at the first save.
    """
    import torch
    from megatron.training import get_args

    args = get_args()
    if not (args.use_distributed_optimizer and (args.save or args.optimizer_cpu_offload)):
        return
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    there = host_memory.of_this_machine()
    device = torch.cuda.current_device()
    fullest = torch.tensor([*host_memory.parameters_held(model), -there], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(fullest, torch.distributed.ReduceOp.MAX)
    experts, rest, least = fullest.tolist()
    memory = host_memory.of_job(args, experts, rest, per_node, args.world_size)
    wrong = host_memory.problem(memory, -least, args.distrib_optim_fully_reshardable_mem_efficient)
    if wrong is not None:
        raise RefusedArgument("{}: {}. Use {}".format(*wrong))


@contextmanager
def _without_new_mtp_layers(call: dict[str, Any]) -> Iterator[None]:
    """MTP layers that the checkpoint does not have keep their initial values: it is not asked for them."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
    from megatron.training import get_args

    args = get_args()
    start = start_of(args) if "mtp_num_layers" in args.checkpoint_changes else None
    if start is None or start.recorded is None or start.recorded.args is None:
        yield
        return
    kept = getattr(start.recorded.args, "mtp_num_layers", None) or 0
    blocks = [
        m for chunk in call["ddp_model"] for m in chunk.modules() if isinstance(m, MultiTokenPredictionBlock)
    ]
    for block in blocks:
        block.sharded_state_dict = _first_layers(block.sharded_state_dict, kept)
    call["strict"] = False
    try:
        yield
    finally:
        for block in blocks:
            del block.sharded_state_dict


def _first_layers(original: Callable[..., dict[str, Any]], kept: int) -> Callable[..., dict[str, Any]]:
    """A block's `sharded_state_dict` with its first layers alone."""

    def sharded_state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        whole = original(*args, **kwargs)
        layers = {name: re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in whole}
        return {name: whole[name] for name, layer in layers.items() if layer is None or int(layer[1]) < kept}

    return sharded_state_dict


def _load_schedule(call: dict[str, Any], iteration: int) -> None:
    """Without the optimizer Megatron leaves the schedule at its beginning, whatever the options for it say."""
    from megatron.training import get_args

    args, scheduler = get_args(), call["opt_param_scheduler"]
    if scheduler is None or not iteration or call["load_arg"] != "load":
        return
    start = start_of(args)
    recorded = None if start is None or not start.goes_on else start.recorded
    if recorded is None or recorded.scheduler is None or not reads_schedule(args):
        return
    if args.no_load_optim:
        scheduler.load_state_dict(dict(recorded.scheduler))
    if args.use_checkpoint_opt_param_scheduler:
        _keep_rates(args, call["optimizer"], scheduler)
        there = planned(recorded.args) if recorded.args is not None else None
        if there is not None:  # what Megatron does not keep in the scheduler's state
            scheduler.init_lr, scheduler.wsd_decay_steps = there["init_lr"], there["wsd_decay_steps"]
            scheduler.lr_wsd_decay_style = there["lr_wsd_decay_style"]
    scheduler.step(0)


def _keep_rates(args: Any, optimizer: Any, scheduler: Any) -> None:
    """Parameter groups carry the rates of the run that made them, and these count before the scheduler's."""
    for group in optimizer.param_groups:
        for name, mine in (("max_lr", args.lr), ("min_lr", args.min_lr)):
            if group.get(name) == mine:
                group[name] = getattr(scheduler, name)
