"""Loss of held-out windows through the trainer's own pipeline: its schedule, forward step, model and
ranks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dsv3_megatron.demo.heldout import Windows


def mean_loss(model: list[Any], windows: Windows) -> float | None:
    """Mean cross entropy (nats) of the targets of `windows`; None on ranks to which the schedule gives no losses
    (under 1F1B all but those of the last pipeline stage).

    To be called on every rank, with Megatron's model chunks in evaluation mode. Each data-parallel rank takes
    its share of the windows, whose number must be divisible by micro batch × data-parallel size.
    """
    from megatron.core import mpu
    from megatron.training import get_args

    from dsv3_megatron.training.forward import run_forward
    from dsv3_megatron.training.step import forward_step

    args = get_args()
    dp_rank, dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    if windows.tokens.shape[0] % (dp_size * args.micro_batch_size):
        raise ValueError(
            f"{windows.tokens.shape[0]} windows are not divisible by "
            f"micro batch {args.micro_batch_size} × {dp_size} data-parallel ranks"
        )
    num_microbatches = windows.tokens.shape[0] // (dp_size * args.micro_batch_size)
    reports = run_forward(
        forward_step,
        model,
        lambda: _batches(windows, dp_rank, dp_size, args.micro_batch_size),
        num_microbatches,
    )
    if not reports:
        return None
    total = torch.stack([report["lm loss"].double() for report in reports]).sum(dim=0)  # [loss sum, targets]
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
    loss_sum, num_targets = total.tolist()
    expected = windows.targets().size
    assert num_targets == expected, f"{num_targets=} evaluated, {expected} given"
    return loss_sum / num_targets


def _batches(
    windows: Windows, dp_rank: int, dp_size: int, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    arrays = {"tokens": windows.tokens, "labels": windows.labels, "loss_mask": windows.loss_mask}
    mine = {
        name: torch.from_numpy(np.ascontiguousarray(rows[dp_rank::dp_size])) for name, rows in arrays.items()
    }
    positions = torch.arange(windows.tokens.shape[1]).expand_as(mine["tokens"]).contiguous()
    mine["position_ids"] = positions
    for start in range(0, positions.shape[0], batch_size):
        yield {name: rows[start : start + batch_size] for name, rows in mine.items()}
