"""`MTPLossLoggingHelper.track_mtp_metrics`: the logged MTP loss is a mean over the global batch.

Megatron averages the means of ranks and microbatches, which is another number where their valid tokens
differ; the main loss is logged as sum over count. Needs the sums that `mtp_loss` collects.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def track_mtp_metrics(
        loss_scale: float,
        iteration: int,
        writer: Any,
        wandb_writer: Any = None,
        total_loss_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

        tracker = MTPLossLoggingHelper.tracker
        if "loss_sums" in tracker:
            sums_and_tokens = torch.stack([tracker.pop("loss_sums"), tracker["total_values"]])
            if tracker["avg_group"] is not None:
                dist.all_reduce(sums_and_tokens, group=tracker["avg_group"])
            # Equal on all ranks now, so Megatron's own average leaves it as it is.
            tracker["mean_losses"] = sums_and_tokens[0] / sums_and_tokens[1].clamp(min=1)
            tracker["loss_values"].copy_(tracker["mean_losses"])
            loss_scale = 1.0
        original.__func__(loss_scale, iteration, writer, wandb_writer, total_loss_dict)

    return staticmethod(track_mtp_metrics)


PATCH = Patch(
    name="mtp_loss_logging",
    target="megatron.core.transformer.multi_token_prediction:MTPLossLoggingHelper.track_mtp_metrics",
    signature="(loss_scale, iteration, writer, wandb_writer=None, total_loss_dict=None)",
    why="the logged MTP loss is the mean over the valid tokens of the whole global batch",
    install=_install,
)
