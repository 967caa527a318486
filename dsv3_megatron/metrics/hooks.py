"""Hooks the metrics into Megatron's training loop: two patches call back here."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron import patching
from dsv3_megatron.metrics import report
from dsv3_megatron.metrics.collector import Collector
from dsv3_megatron.metrics.flops import ModelSizes, flops_per_token

__all__ = ["add_figures", "install", "latest", "on_counts"]


class _Interval:
    """What has been trained since the last logged step."""

    def __init__(self) -> None:
        self.samples = 0
        self.consumed: int | None = None

    def add_step(self, args: Any) -> None:
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

        if self.consumed is None:  # first step of this process
            self.consumed = args.consumed_train_samples - get_current_running_global_batch_size()
        self.samples += args.consumed_train_samples - self.consumed
        self.consumed = args.consumed_train_samples


_collector = Collector()
_interval = _Interval()
_latest: dict[str, Any] = {}
_counted: list[Callable[[list[torch.nn.Module]], None]] = []
_more: list[Callable[[dict[str, Any]], dict[str, float]]] = []


def install() -> None:
    """Report the metrics of docs/metrics.md whenever Megatron logs; idempotent. Call before training starts.

    Raises:
        dsv3_megatron.patching.PatchMismatch: this Megatron version differs from the patches' expectation.
    """
    patching.install(["expert_counts", "training_log"])


def add_figures(function: Callable[[dict[str, Any]], dict[str, float]]) -> None:
    """Add what `function(record)` returns to each logged step's record; called on every rank, it must agree on all."""
    if function not in _more:
        _more.append(function)


def on_counts(function: Callable[[list[torch.nn.Module]], None]) -> None:
    """Call `function(chunks)` whenever the routers of this rank hold a whole global batch's token counts."""
    if function not in _counted:
        _counted.append(function)


def latest() -> dict[str, Any]:
    """Figures of the last logged step, the same on every rank; empty before the first."""
    return dict(_latest)


def before_counts_are_cleared(config: Any, model: list[torch.nn.Module]) -> None:
    """Called by the patch `expert_counts` at the end of each global batch."""
    _collector.snapshot(config, model)
    for function in _counted:
        function(model)


def around_training_log(original: Any, call: dict[str, Any]) -> Any:
    """Called by the patch `training_log` once per step, on all ranks, with the arguments by name."""
    from megatron.training import get_args

    args = get_args()
    iteration, is_first = call["iteration"], call["is_first_iteration"]
    _interval.add_step(args)
    if iteration % args.log_interval != 0 and not is_first:
        result = original(**call)
    else:
        # Megatron's own report resets these.
        seconds = _seconds_per_interval()
        steps, losses = _sums_with_this_step(call)
        result = original(**call)
        _report(args, call, seconds, steps, losses)
        if not is_first:  # Megatron keeps its own sums then, too
            _interval.samples = 0
    _collector.enabled = (iteration + 1) % args.log_interval == 0
    return result


def _seconds_per_interval() -> float:
    """Training time since the last logged step, without evaluation and saving, as Megatron measures it."""
    from megatron.training import get_timers

    return get_timers()("interval-time").elapsed(reset=False)


def _sums_with_this_step(call: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Steps whose loss counts since the last logged step, and the sums of their losses (on the last rank).

    The sum of the MTP losses still lacks this step's, which Megatron adds in its report.
    """
    totals = call["total_loss_dict"]
    steps = totals.get("advanced iterations", 0) + (0 if call["skipped_iter"] else 1)
    losses = {name: value for name, value in totals.items() if name.endswith("loss")}
    if not call["skipped_iter"]:
        for name, value in call["loss_dict"].items():
            losses[name] = losses.get(name, 0) + value
    return steps, losses


def _from_last_rank(
    seconds: float, steps: int, sums: dict[str, Any], mtp_num_layers: int
) -> tuple[float, float | None, float | None]:
    """Seconds, main loss and mean of the MTP losses over the interval, as the last rank has them."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    device = torch.cuda.current_device()
    main = torch.as_tensor(sums.get("lm loss", torch.nan), device=device).sum()
    mtp = torch.tensor(torch.nan, device=device)
    if mtp_num_layers and "mean_losses" in MTPLossLoggingHelper.tracker:
        before = sum(sums.get(f"mtp_{depth + 1} loss", 0) for depth in range(mtp_num_layers))
        mtp = (before + MTPLossLoggingHelper.tracker["mean_losses"].sum()).sum() / mtp_num_layers
    values = torch.stack([torch.tensor(seconds, device=device), main / max(1, steps), mtp / max(1, steps)])
    torch.distributed.broadcast(values, src=torch.distributed.get_world_size() - 1)
    seconds, *losses = values.tolist()
    lm_loss, mtp_loss = (None if math.isnan(loss) else loss for loss in losses)
    return seconds, lm_loss, mtp_loss


def _report(args: Any, call: dict[str, Any], seconds: float, steps: int, sums: dict[str, Any]) -> None:
    """Compute the record on all ranks; the last rank writes it."""
    from megatron.training import get_tensorboard_writer
    from megatron.training.utils import print_rank_last

    layers = _collector.reduce()
    seconds, lm_loss, mtp_loss = _from_last_rank(seconds, steps, sums, args.mtp_num_layers or 0)
    tokens_per_s = _interval.samples * args.seq_length / seconds
    sizes = ModelSizes.from_config(_collector.config, args.padded_vocab_size, args.seq_length)
    flops = {name: flops_per_token(sizes, causal=name == "causal") for name in ("causal", "non_causal")}
    record = {
        "iteration": call["iteration"],
        "consumed_train_samples": args.consumed_train_samples,
        "consumed_train_tokens": args.consumed_train_samples * args.seq_length,
        "lm_loss": lm_loss,
        "mtp_loss": mtp_loss,
        "tokens_per_s": tokens_per_s,
        **{f"model_flops_per_token_{name}": value for name, value in flops.items()},
        **{
            f"model_flops_per_s_per_gpu_{name}": value * tokens_per_s / args.world_size
            for name, value in flops.items()
        },
        **report.expert_figures(layers),
        **({"expert_groups": _collector.config.moe_router_num_groups or 1} if layers else {}),
    }
    for function in _more:
        record |= function(record)
    _latest.clear()
    _latest.update(record)
    print_rank_last(report.console(record, args.num_layers))
    writer = get_tensorboard_writer()
    if writer is not None and not call["is_first_iteration"]:
        report.to_tensorboard(writer, record)
        report.append_json(Path(args.tensorboard_dir) / "metrics.jsonl", record)
