"""Routing mathematics of DeepSeek-V3 (R§2.1.2) in plain PyTorch; no Megatron, no process groups.

Shape suffixes: T tokens, S positions of a sequence, B sequences, E experts, K chosen experts, G groups.

One tie rule everywhere: of equal scores the lower index wins, for groups as for experts, and the chosen
    experts are returned best first. (`torch.topk` promises no order among equals, so it may differ between
    devices and layouts.)
"""

import torch
from torch import Tensor


def check_routing(num_experts: int, topk: int, num_groups: int | None, group_topk: int | None) -> None:
    """Refuse sizes with which group-limited routing has no meaning.

    Args:
        num_experts: routed experts E (`num_moe_experts`).
        topk: experts per token K (`moe_router_topk`).
        num_groups: expert groups G (`moe_router_num_groups`), None for routing without groups.
        group_topk: groups per token (`moe_router_group_topk`), None for routing without groups.

    Raises:
        ValueError: names the option, its value and what it must be.
    """
    if not 1 <= topk <= num_experts:
        raise ValueError(f"moe_router_topk={topk} must lie between 1 and num_moe_experts={num_experts}")
    if num_groups is None and group_topk is None:
        return
    if num_groups is None or group_topk is None:
        raise ValueError(
            f"moe_router_num_groups={num_groups} and moe_router_group_topk={group_topk} belong together: "
            "give both, or neither to route without groups"
        )
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"moe_router_num_groups={num_groups} must divide num_moe_experts={num_experts}")
    group_size = num_experts // num_groups
    if group_size < 2:
        raise ValueError(
            f"moe_router_num_groups={num_groups} leaves {group_size} expert per group, but a group is "
            f"scored by its two best experts: use at most {num_experts // 2} groups"
        )
    if not 1 <= group_topk <= num_groups:
        raise ValueError(
            f"moe_router_group_topk={group_topk} must lie between 1 and moe_router_num_groups={num_groups}"
        )
    if topk > group_topk * group_size:
        raise ValueError(
            f"moe_router_topk={topk} experts do not fit into moe_router_group_topk={group_topk} groups of "
            f"{group_size}: raise moe_router_group_topk to {-(-topk // group_size)} or lower moe_router_topk"
        )


def affinity(logits: Tensor, score_function: str = "sigmoid") -> Tensor:
    """Scores of the experts, computed in fp32, or in fp64 for fp64 logits.

    Args:
        logits: [..., E], any floating dtype.
        score_function: "sigmoid", s = σ(u·e) (R§2.1.2 eq. 15), or "softmax" over the experts (DeepSeek-V2).

    Returns:
        [..., E] fp32 or fp64, differentiable.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.sigmoid() if score_function == "sigmoid" else wide.softmax(dim=-1)


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] int64 of the k best of the last dimension, best first; of equals the lower index."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def group_limited_topk(
    scores: Tensor,
    bias: Tensor | None,
    topk: int,
    num_groups: int | None,
    group_topk: int | None,
    scaling: float = 1.0,
    normalize: bool = True,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose K experts per token and weigh them (R§2.1.2 eq. 13, 14, 16; `Gate.forward` of DeepSeek-V3).

    The bias takes part in the choice of groups and experts only. A group's score is the sum of its two best
    biased scores, whatever K and `group_topk` are; experts of groups not kept are masked with −inf, so that
    none is chosen even where all biased scores are negative. The weights are the unbiased scores of the
    chosen, normalised to sum to 1 and multiplied by `scaling`.

    Args:
        scores: [T, E] fp32 or fp64 from `affinity`.
        bias: [E] fp32, or None.
        topk: experts per token.
        num_groups: groups of E / num_groups neighbouring experts, or None for no group limit.
        group_topk: groups kept per token, or None with `num_groups` None.
        scaling: routed scaling factor (2.5 in DeepSeek-V3).
        normalize: let the weights sum to `scaling` (DeepSeek-V3), or take scores · `scaling` (DeepSeek-V2).
        given: experts [T, K] int64 that were chosen before, and are weighed by the present scores; a row of −1 is
            chosen now.

    Returns:
        weights [T, K] of the scores' dtype (differentiable) and expert indices [T, K] int64, in order of the
        biased scores.

    Raises:
        ValueError: from `check_routing`.
    """
    num_tokens, num_experts = scores.shape
    check_routing(num_experts, topk, num_groups, group_topk)
    with torch.no_grad():
        biased = scores if bias is None else scores + bias
        if num_groups is not None and group_topk is not None:
            grouped_TGe = biased.view(num_tokens, num_groups, num_experts // num_groups)
            group_score_TG = grouped_TGe.topk(2, dim=-1).values.sum(dim=-1)
            kept = stable_topk(group_score_TG, group_topk)
            dropped_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(1, kept, False)
            biased = grouped_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)
        indices = stable_topk(biased, topk)
        if given is not None:
            indices = torch.where(given >= 0, given, indices)
    chosen = scores.gather(1, indices)
    if not normalize:
        return chosen * scaling, indices
    # 1e-20 as in the released Gate: sigmoid underflows to 0 for logits below −103.
    return chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20) * scaling, indices


def to_dense(weights: Tensor, indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The same choice as matrices over all experts, the form Megatron's token dispatchers take.

    Args:
        weights: [T, K].
        indices: [T, K] int64, distinct per row.
        num_experts: E.

    Returns:
        probs [T, E] of the weights' dtype, 0 where not chosen, and routing_map [T, E] bool.
    """
    shape = (indices.shape[0], num_experts)
    probs = weights.new_zeros(shape).scatter(1, indices, weights)
    routing_map = torch.zeros(shape, dtype=torch.bool, device=indices.device).scatter(1, indices, True)
    return probs, routing_map


def count_tokens(routing_map: Tensor, valid: Tensor | None = None) -> Tensor:
    """Tokens per expert, as integers.

    Args:
        routing_map: [S, ..., E] bool.
        valid: [S, ...] bool, False for padded tokens, which are not counted; None counts all.

    Returns:
        [..., E] int64, summed over the first dimension.
    """
    if valid is not None:
        routing_map = routing_map & valid.unsqueeze(-1)
    return routing_map.sum(dim=0, dtype=torch.int64)


def balance_counts(scores: Tensor, topk: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `sequence_balance_loss` needs of a whole sequence: integers, so parts of a sequence simply add up.

    Args:
        scores: [S, B, E] from `affinity`.
        topk: K; chosen here by the unbiased scores and without group limit (R§2.1.2 eq. 18).
        valid: [S, B] bool, False for padded tokens; None means all are valid.

    Returns:
        counts [B, E] int64: valid tokens of each sequence having the expert among their K best;
        num_tokens [B] int64: valid tokens of each sequence.
    """
    with torch.no_grad():
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, stable_topk(scores, topk), True)
        if valid is None:
            valid = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)
        return count_tokens(chosen, valid), valid.sum(dim=0, dtype=torch.int64)


def sequence_balance_loss(
    scores: Tensor,
    topk: int,
    alpha: float,
    valid: Tensor | None = None,
    counts: Tensor | None = None,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """Complementary sequence-wise balance loss α·Σ_i f_i·P_i, averaged over sequences (R§2.1.2 eq. 17–20).

    f_i = E/(K·T)·(tokens of the sequence with expert i among their K best unbiased scores) and
    P_i = 1/T·Σ_t s_it / Σ_j s_jt, with T the sequence's valid tokens. A sequence without valid tokens adds 0
    and still counts in the average. Only P_i carries a gradient.

    Where sequences are split over ranks, `counts` and `num_tokens` are `balance_counts` summed over those
    ranks; the value is then this rank's part, and the parts add up to the loss.

    Args:
        scores: [S, B, E] from `affinity`, this rank's part.
        topk: K.
        alpha: weight of the loss (1e-4 in DeepSeek-V3).
        valid: [S, B] bool, False for padded tokens.
        counts: [B, E] int64 of the whole sequences; computed from `scores` when None.
        num_tokens: [B] int64 of the whole sequences; computed from `scores` when None.

    Returns:
        Scalar of the scores' dtype.
    """
    if counts is None or num_tokens is None:
        counts, num_tokens = balance_counts(scores, topk, valid)
    num_sequences, num_experts = counts.shape
    normalised = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    if valid is not None:
        normalised = normalised * valid.unsqueeze(-1)
    tokens_B1 = num_tokens.clamp(min=1).unsqueeze(-1).to(scores.dtype)
    f_BE = counts.to(scores.dtype) * (num_experts / topk) / tokens_B1
    p_BE = normalised.sum(dim=0) / tokens_B1
    return alpha * (f_BE * p_BE).sum() / num_sequences


def load_violation_sign(counts: Tensor) -> Tensor:
    """sign(mean load − expert load), exact for any integer count.

    The mean over E experts is seldom an integer and rounds in floating point once counts pass 2^24, so the
    sign is taken of Σ counts − E·count, in int64.

    Args:
        counts: [..., E] integer.

    Returns:
        [..., E] int64 of −1, 0, 1: 1 for an expert with too few tokens.

    Raises:
        TypeError: the counts are not integers.
    """
    if counts.is_floating_point() or counts.dtype == torch.bool:
        raise TypeError(
            f"tokens per expert must be integers to be exact, not {counts.dtype}: use torch.int64"
        )
    counts = counts.to(torch.int64)
    return torch.sign(counts.sum(dim=-1, keepdim=True) - counts.shape[-1] * counts)


def updated_bias(bias: Tensor, counts: Tensor, update_rate: float) -> Tensor:
    """Auxiliary-loss-free balancing: each bias moves by γ towards the mean load (R§2.1.2).

    Args:
        bias: [..., E] fp32.
        counts: [..., E] integer tokens per expert of the whole global batch, padded tokens excluded.
        update_rate: γ (0.001 in DeepSeek-V3 until 14.3T tokens, then 0, which leaves the bias as it is, bit
            for bit).

    Returns:
        [..., E] fp32, a new tensor.

    Raises:
        TypeError: the bias is not fp32, or the counts are not integers.
    """
    if bias.dtype != torch.float32:
        raise TypeError(
            f"expert_bias must be torch.float32, not {bias.dtype}: γ = 0.001 is lost in fewer bits"
        )
    sign = load_violation_sign(counts)
    if update_rate == 0:
        return bias.clone()
    return bias + sign.to(bias.dtype) * update_rate
