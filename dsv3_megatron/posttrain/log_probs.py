"""Log-probabilities of chosen tokens, without a log-softmax over the whole vocabulary for all tokens at once.

The table of log-probabilities of V3's 129,280 entries is the largest tensor of a post-training step (2.1 GB in fp32 for
4096 tokens). Here it exists for `chunk` tokens at a time, in the backward pass too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["CHUNK", "selected_log_probs", "sequence_sums"]

CHUNK = 1024  # tokens whose log-softmax exists at the same time


def selected_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK, temperature: float = 1.0
) -> Tensor:
    """log softmax(hidden · weightᵀ / temperature) at `targets`.

    Args:
        hidden: [T, H].
        weight: of the output layer, [V, H].
        targets: int64 [T].
        chunk: tokens computed at once; any number gives the same values.

    Returns:
        [T], fp32 or, for fp64 inputs, fp64. Differentiable in `hidden` and `weight`.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least one token")
    parts = [
        checkpoint(_chosen, part, weight, target, temperature, use_reentrant=False)
        for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def _chosen(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = hidden @ weight.t()
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return -F.cross_entropy(logits.to(exact) / temperature, targets, reduction="none")


def sequence_sums(values: Tensor, sequences: Tensor, count: int) -> Tensor:
    """Sums of `values` by sequence: [T] and int64 [T] (below 0: of none) → [count]."""
    inside = sequences >= 0
    sums = values.new_zeros(count)
    return sums.index_add(0, sequences[inside], values[inside])
