"""Log-probabilities of answers under the trainer's model, through its own schedule: any layout, no engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Scored", "score", "to_sums", "to_table"]


class Scored(NamedTuple):
    """Answer tokens of a microbatch: whose they are, where their label stands in the sequence, log π of it; all [n]."""

    sequence: Tensor
    position: Tensor
    log_prob: Tensor


def score(
    model: list[Any], batches: Callable[[], Iterator | None], num_microbatches: int, around: Any = None
) -> list[Scored]:
    """Score one set of microbatches; to be called on every rank.

    Args:
        batches: gives an iterator over this rank's microbatches (with `sequence`), one for each chunk; None on ranks
            that read none.

        around: (model, batch) -> context of a chunk's forward pass.

    Returns:
        What this rank's last stage saw; empty on ranks without it.
    """
    from dsv3_megatron.training.forward import run_forward

    modes = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad():
            return run_forward(
                partial(_forward_step, around), model, batches, num_microbatches, collect_non_loss_data=True
            )
    finally:
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)


def to_table(found: Sequence[Scored], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [sequences, positions] on every rank, fp64, and which of them are known (bool).

    A token that several ranks have scored, or one rank twice, has the mean.
    """
    import torch.distributed as dist
    from megatron.core import mpu

    table = torch.zeros((2, *shape), dtype=torch.float64, device=torch.cuda.current_device())
    if mpu.get_tensor_model_parallel_rank() == 0:  # the others have the same
        for part in found:
            place = (part.sequence, part.position)
            values = torch.stack(
                [part.log_prob.double(), torch.ones_like(part.log_prob, dtype=torch.float64)]
            )
            for half, value in zip(table, values, strict=True):
                half.index_put_(place, value, accumulate=True)
    dist.all_reduce(table)
    total, count = table
    return total / count.clamp(min=1), count > 0


def to_sums(found: Sequence[Scored], count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of whole answers [count] on every rank, fp64, and which of them are known (bool).

    An answer is whole in its microbatch; one that was scored several times has the mean.
    """
    import torch.distributed as dist
    from megatron.core import mpu

    sums = torch.zeros((2, count), dtype=torch.float64, device=torch.cuda.current_device())
    if mpu.get_tensor_model_parallel_rank() == 0:  # the others have the same
        for part in found:
            sums[0].index_add_(0, part.sequence, part.log_prob.double())
            sums[1, part.sequence.unique()] += 1
    dist.all_reduce(sums)
    return sums[0] / sums[1].clamp(min=1), sums[1] > 0


def _forward_step(around: Any, data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
    from dsv3_megatron.training.batch import get_batch, packed_seq_params

    batch = get_batch(data_iterator, model)
    with nullcontext() if around is None else around(model, batch):
        losses = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed_seq_params(batch),
            padding_mask=batch["padding_mask"],
        )
    return losses, partial(_collect, batch)


def _collect(batch: dict[str, Any], losses: Tensor, non_loss_data: bool) -> Scored:
    sequence, position = batch["sequence"].flatten(), batch["position_ids"].flatten() + 1
    inside = sequence >= 0
    return Scored(sequence[inside], position[inside], -losses.flatten()[inside])
