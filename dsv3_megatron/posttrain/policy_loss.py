"""Group relative policy optimisation as pure functions.

DeepSeekMath (arXiv 2402.03300) §4.1; R1 (arXiv 2501.12948) equations 1 to 3.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "REDUCTIONS",
    "Policy",
    "group_advantages",
    "grpo_loss",
    "grpo_terms",
    "kl_estimate",
    "truncated_weights",
]

REDUCTIONS = ("token", "sequence")
_LARGEST = 80.0  # nats; exp of 89 is infinite in fp32, and infinity times an advantage of 0 no number


@dataclass(frozen=True)
class Policy:
    """What each token gives; all of the log-probabilities' shape, 0 where the mask is.

    Attributes:
        loss: differentiable.
        kl: estimate of KL(π ‖ π_ref), detached.
        ratio: π / π_old, detached.
        clipped: whether the clipped side was the smaller one, as 0 or 1.
    """

    loss: Tensor
    kl: Tensor
    ratio: Tensor
    clipped: Tensor


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    beta: float,
    reduction: Literal["token", "sequence"] = "token",
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean of −[min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) − β D] with ρ = π / π_old, D = π_ref/π − log(π_ref/π) − 1.

    Args:
        logp, old_logp, ref_logp: log-probabilities of the sampled tokens, [B, T]; `ref_logp` may be None where β is 0.
        advantages: [B], of each sequence, or [B, T].
        mask: [B, T], not 0 where a token counts (those of the answer).
        clip: ε.
        beta: β.
        reduction: "token": over all tokens of the batch; "sequence": over a sequence's tokens, then over the sequences
            (DeepSeekMath eq. 3). They differ where lengths do.
        weights: [B, T], constant factors of the policy's term, see `truncated_weights`.

    Returns:
        Scalar; 0 where no token counts.

    Raises:
        ValueError: shapes that differ, or a constant out of its range.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: use {' or '.join(map(repr, REDUCTIONS))}")
    loss = grpo_terms(logp, old_logp, ref_logp, advantages, mask, clip, beta, weights=weights).loss
    counts = mask != 0
    if reduction == "token":
        return loss.sum() / counts.sum().clamp(min=1)
    return (loss.sum(-1) / counts.sum(-1).clamp(min=1)).sum() / max(len(loss), 1)


def grpo_terms(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    beta: float,
    *,
    weights: Tensor | None = None,
) -> Policy:
    """As `grpo_loss`, token by token. What stands where the mask is 0 is never looked at, NaN included."""
    if advantages.shape == logp.shape[:-1]:
        advantages = advantages.unsqueeze(-1).expand_as(logp)
    _check(logp, old_logp, ref_logp, advantages, mask, clip, beta, weights)
    counts = mask != 0
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)

    def inside(values: Tensor) -> Tensor:
        return torch.where(counts, values, zero)

    new, advantages = inside(logp), inside(advantages.to(logp.dtype))
    ratio = torch.exp((new - inside(old_logp.detach())).clamp(max=_LARGEST))
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    policy = torch.minimum(free, held)
    if weights is not None:
        policy = policy * inside(weights.detach())
    kl = torch.zeros_like(new) if ref_logp is None else inside(kl_estimate(new, inside(ref_logp.detach())))
    loss = inside(beta * kl - policy) if beta else inside(-policy)
    return Policy(loss, kl.detach(), inside(ratio.detach()), (held < free).detach().to(logp.dtype))


def kl_estimate(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """π_ref/π − log(π_ref/π) − 1 of tokens drawn from π: never negative, its mean is KL(π ‖ π_ref)."""
    difference = ref_logp - logp
    return torch.expm1(difference.clamp(max=_LARGEST)) - difference


def truncated_weights(trainer_logp: Tensor, engine_logp: Tensor, limit: float) -> Tensor:
    """min(π_trainer / π_engine, limit): corrects for samples that were drawn by an engine that computes differently.

    Both are log-probabilities of the same tokens under the same weights. Infinite `limit`: not truncated.
    """
    if not limit > 0:
        raise ValueError(f"limit={limit}: must be above 0")
    return torch.exp(trainer_logp - engine_logp).clamp(max=limit).detach()


def group_advantages(
    rewards: Tensor, deviation: Literal["population", "sample"] = "population", epsilon: float = 0.0
) -> Tensor:
    """(r − mean r) / (std r + epsilon) of each group: [groups, G] → [groups, G].

    Args:
        rewards: finite.
        deviation: "population" divides squares by G (Megatron's; DeepSeekMath says only "std"), "sample" by G − 1
            (TRL's, with epsilon 1e-4).

    Returns:
        0 for a group whose rewards are all alike, whatever the epsilon. Same dtype.

    Raises:
        ValueError: a reward is not finite, or the shape is not [groups, G].
    """
    if deviation not in ("population", "sample"):
        raise ValueError(f"deviation={deviation!r}: use 'population' or 'sample'")
    if rewards.dim() != 2:
        raise ValueError(f"rewards of the shape {tuple(rewards.shape)}: [groups, samples] is needed")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards: NaN or infinite; decide what such a sample counts before")
    size, exact = rewards.shape[1], rewards.double()
    centred = exact - exact.mean(1, keepdim=True)
    # By the rewards themselves: the mean of equal numbers is rounded, and would leave a deviation of rounding errors.
    alike = (rewards == rewards[:, :1]).all(1, keepdim=True)
    square = centred.square().sum(1, keepdim=True) / max(size if deviation == "population" else size - 1, 1)
    scale = torch.where(alike, torch.ones_like(square), square.sqrt() + epsilon)
    return torch.where(alike, torch.zeros_like(centred), centred / scale).to(rewards.dtype)


def _check(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    beta: float,
    weights: Tensor | None,
) -> None:
    given = {
        "logp": logp,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "advantages": advantages,
        "mask": mask,
        "weights": weights,
    }
    shapes = {name: tuple(value.shape) for name, value in given.items() if value is not None}
    wrong = [f"{name} {shape}" for name, shape in shapes.items() if shape != tuple(logp.shape)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not of the shape {tuple(logp.shape)} of logp")
    if not clip > 0:
        raise ValueError(f"clip={clip}: must be above 0")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta={beta}: must be 0 or more, and finite")
    if beta and ref_logp is None:
        raise ValueError(f"beta={beta}: needs ref_logp; without a reference use 0")
