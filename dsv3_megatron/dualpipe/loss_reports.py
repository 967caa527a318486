"""Losses of a step on every pipeline rank, wherever they arose.

Megatron logs on the last rank of the job, which holds the last stage of its own pipelines. Under DualPipeV the losses
are on pipeline rank 0, under DualPipe on both ends.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

# What Megatron's MTP log accumulates between two logged steps (`loss_sums` is of the patch mtp_loss).
_MTP_VALUES = ("loss_values", "correct_values", "total_values", "loss_sums")


def share(
    losses: list[dict[str, torch.Tensor]], pp_group: Any, training: bool
) -> list[dict[str, torch.Tensor]]:
    """The losses of the group's first rank, on all of its ranks; in training its MTP log too.

    Args:
        losses: as the loss function reported them, one dict per microbatch; empty on the other ranks.
        pp_group: Megatron's pipeline group, whose first rank holds the last stage.
    """
    if pp_group.size() == 1:
        return losses
    tracker = MTPLossLoggingHelper.tracker
    mtp = {name: tracker[name] for name in _MTP_VALUES if name in tracker} if training else {}
    box = [_to([*losses, mtp], "cpu")]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(pp_group)[0], group=pp_group)
    *losses, mtp = _to(box[0], torch.cuda.current_device())
    if mtp and pp_group.rank() > 0:
        tracker.update(mtp)
        tracker["reduce_group"] = None
        tracker["avg_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return losses


def _to(reports: list[dict[str, torch.Tensor]], device: Any) -> list[dict[str, torch.Tensor]]:
    return [{name: value.to(device) for name, value in report.items()} for report in reports]
