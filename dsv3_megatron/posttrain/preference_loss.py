"""Direct preference optimisation and its variants as pure functions.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "Preference", "dpo_loss", "dpo_terms", "sequence_sums"]

LOSSES = ("sigmoid", "ipo")


@dataclass(frozen=True)
class Preference:
    """What each pair gives: all [N].

    Attributes:
        loss: of the pair, differentiable.
        chosen, rejected: log π − log π_ref of the answers, detached; sums over their tokens.
    """

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """Mean over pairs of −log σ(β h), h = (log π − log π_ref)(chosen) − (log π − log π_ref)(rejected).

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: sums of log-probabilities over an answer's tokens,
            [N].
        beta: strength of the reference, above 0.
        label_smoothing: ε, share of pairs taken to be labelled the wrong way round:
            −(1 − ε) log σ(β h) − ε log σ(−β h) (arXiv 2305.18290v3's conservative DPO).
        loss: "ipo" is (h − 1 / (2 β))² (Azar et al. 2023, arXiv 2310.12036, eq. 17).
        chosen_lengths, rejected_lengths: numbers of answer tokens [N]; where they are given, each log-ratio is divided
            by its answer's length ("length-normalised"; so TRL computes its `ipo` and `sigmoid_norm`).

    Returns:
        Scalar.

    Raises:
        ValueError: no pair, shapes that differ, or a constant out of its range.
    """
    terms = dpo_terms(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        beta,
        label_smoothing=label_smoothing,
        loss=loss,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    if not terms.loss.numel():
        raise ValueError("no pairs: the mean of none is not defined")
    return terms.loss.mean()


def dpo_terms(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    loss: str = "sigmoid",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Preference:
    """As `dpo_loss`, pair by pair."""
    _check(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing, loss)
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths and rejected_lengths: give both or none")
    for name, lengths in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        if lengths is not None and lengths.shape != policy_chosen.shape:
            raise ValueError(
                f"{name} {tuple(lengths.shape)}: not of the shape {tuple(policy_chosen.shape)} [pairs]"
            )
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    # Of answers without tokens the ratio is 0, whatever it is divided by.
    h = _per_token(chosen, chosen_lengths) - _per_token(rejected, rejected_lengths)
    if loss == "ipo":
        per_pair = (h - 1 / (2 * beta)) ** 2
    else:
        per_pair = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    return Preference(per_pair, chosen.detach(), rejected.detach())


def sequence_sums(values: Tensor, sequences: Tensor, count: int) -> Tensor:
    """Sums of `values` by sequence: [T] and int64 [T] (below 0: of none) → [count]."""
    inside = sequences >= 0
    sums = values.new_zeros(count)
    return sums.index_add(0, sequences[inside], values[inside])


def _per_token(ratio: Tensor, lengths: Tensor | None) -> Tensor:
    return ratio if lengths is None else ratio / lengths.clamp(min=1)


def _check(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, beta: float, label_smoothing: float, loss: str
) -> None:
    shapes = [tuple(t.shape) for t in (a, b, c, d)]
    if len(set(shapes)) > 1 or a.dim() != 1:
        raise ValueError(f"log-probabilities of the shapes {shapes}: four of one shape [pairs] are needed")
    if not (beta > 0 and torch.isfinite(torch.tensor(beta))):
        raise ValueError(f"beta={beta}: must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: must be at least 0 and below 0.5")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: use {' or '.join(map(repr, LOSSES))}")
    if loss == "ipo" and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing}: IPO has none; use 0, or loss='sigmoid'")
