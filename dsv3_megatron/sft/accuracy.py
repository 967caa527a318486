"""How many answers of held-out conversations a model gets right, through the trainer's own pipeline."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from dsv3_megatron.sft.dataset import PackedRows

Accuracy = dict[str, float]


def accuracy(model: list[Any], rows: PackedRows) -> Accuracy | None:
    """Shares of answer tokens and of whole answers for which the model's first choice is right, on ranks that hold the
    last stage; None on the others.

    The choice at each position is made after the true tokens before it. An answer counts as exact if all its tokens
    are right, which is when greedy decoding writes it. To be called on every rank; all of `rows` are evaluated, whose
    number must be a whole number of the run's global batches. No tensor parallelism.
    """
    from megatron.core import mpu
    from megatron.training import get_args

    from dsv3_megatron.training.forward import run_forward

    args = get_args()
    assert args.tensor_model_parallel_size == 1, "the first choice is looked for in whole logits"
    dp_rank, dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    count, rest = divmod(len(rows), dp_size * args.micro_batch_size)
    assert not rest, f"{len(rows)} rows for {dp_size} × {args.micro_batch_size}"
    modes = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        counts = run_forward(
            _forward_step,
            model,
            lambda: _batches(rows, dp_rank, dp_size, args.micro_batch_size),
            count,
            collect_non_loss_data=True,
        )
    for chunk, mode in zip(model, modes, strict=True):
        chunk.train(mode)
    if not counts:
        return None
    total = torch.stack(counts).sum(0)
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
    right, tokens, exact, answers = total.tolist()
    return {"token_accuracy": right / tokens, "exact_match": exact / answers}


def _batches(rows: PackedRows, dp_rank: int, dp_size: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    mine = range(dp_rank, len(rows), dp_size)
    for start in range(0, len(mine), size):
        yield default_collate([rows[i] for i in mine[start : start + size]])


def _forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    from dsv3_megatron.training.batch import get_batch, packed_seq_params

    batch = get_batch(data_iterator, model)
    logits = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        packed_seq_params=packed_seq_params(batch),
        padding_mask=batch["padding_mask"],
    )
    return logits, partial(_count, batch["labels"], batch["loss_mask"])


def _count(
    labels: torch.Tensor, loss_mask: torch.Tensor, logits: torch.Tensor, non_loss_data: bool
) -> torch.Tensor:
    """[right tokens, answer tokens, exact answers, answers] of a microbatch, int64."""
    target = loss_mask.flatten() > 0
    right = (logits.argmax(-1).flatten() == labels.flatten()) & target
    # An answer is a run of targets.
    starts = target & ~torch.cat([target.new_zeros(1), target[:-1]])
    answer = starts.cumsum(0)[target]
    wrong = torch.zeros(int(starts.sum()), dtype=torch.bool, device=logits.device)
    wrong[answer[~right[target]] - 1] = True
    return torch.stack([right.sum(), target.sum(), (~wrong).sum(), starts.sum()])


def bigram_accuracy(train: PackedRows, valid: PackedRows) -> float:
    """Token accuracy, on the answers of `valid`, of always choosing what most often followed the previous token in the
    answers of `train`: what form alone gives."""
    following: dict[int, Counter[int]] = {}
    overall: Counter[int] = Counter()
    for previous, label in _targets(train):
        following.setdefault(previous, Counter())[label] += 1
        overall[label] += 1
    choice = {previous: counts.most_common(1)[0][0] for previous, counts in following.items()}
    default = overall.most_common(1)[0][0]
    return float(np.mean([choice.get(previous, default) == label for previous, label in _targets(valid)]))


def _targets(rows: PackedRows) -> Iterator[tuple[int, int]]:
    """(token, next token) wherever the next one is the assistant's."""
    for index in range(len(rows)):
        row = rows[index]
        target = row["loss_mask"] > 0
        yield from zip(row["tokens"][target].tolist(), row["labels"][target].tolist(), strict=True)
