"""What a run does to begin with a checkpoint, beside Megatron's own loading."""

from typing import Any

from dsv3_megatron.checkpoint.schedule import planned, reads_schedule
from dsv3_megatron.checkpoint.start import start_of

__all__ = ["install"]


def install() -> None:
    """Follow `--checkpoint-changes` and the options of the learning-rate schedule in this process. Idempotent.

    Raises:
        dsv3_megatron.patching.PatchMismatch: this Megatron version differs from the patches' expectation.
    """
    from dsv3_megatron.training import hooks

    hooks.after_validation(_without_mtp)
    hooks.after_load(_load_schedule)


def _without_mtp(args: Any) -> None:
    """Weights of MTP that the checkpoint does not have keep their initial values, and Megatron says which these are."""
    if "mtp_num_layers" in args.checkpoint_changes and args.dist_ckpt_strictness == "assume_ok_unexpected":
        args.dist_ckpt_strictness = "log_unexpected"


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
