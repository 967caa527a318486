"""Routing mathematics against plain Python loops written from the report and the released `Gate`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.specs import routing


def gate(
    scores: list[float], bias: list[float], topk: int, groups: int | None, group_topk: int | None
) -> list[int]:
    """Experts of one token, by loops over Python floats; ties to the lower index."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    allowed = list(range(len(scores)))
    if groups is not None:
        size = len(scores) // groups
        group_score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: (-group_score[g], g))[:group_topk]
        allowed = [e for e in allowed if e // size in kept]
    return sorted(allowed, key=lambda e: (-biased[e], e))[:topk]


def balance_loss(scores: list[list[float]], topk: int, alpha: float) -> float:
    """Eq. 17–20 for one sequence of lists of scores, by loops; 0 for an empty one."""
    if not scores:
        return 0.0
    num_tokens, num_experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(num_experts):
        chosen = sum(i in gate(s, [0.0] * num_experts, topk, None, None) for s in scores)
        f = num_experts / (topk * num_tokens) * chosen
        p = sum(s[i] / sum(s) for s in scores) / num_tokens
        total += f * p
    return alpha * total


SHAPES = [(8, 2, 4, 2), (16, 4, 4, 2), (16, 3, 4, 2), (256, 8, 8, 4), (12, 6, 3, 2), (8, 3, None, None)]


@pytest.mark.parametrize("num_experts, topk, groups, group_topk", SHAPES)
@pytest.mark.parametrize("case", ["random", "negative", "tied", "coarse"])
def test_choice_and_weights_match_loops(num_experts, topk, groups, group_topk, case) -> None:
    torch.manual_seed(num_experts + topk)
    # Multiples of 1/64 are exact in fp32, so that ties are ties on both sides.
    scores = torch.randint(1, 64, (50, num_experts)) / 64
    bias = torch.randint(-16, 16, (num_experts,)) / 64
    if case == "negative":
        bias = bias - 8
    elif case == "tied":
        scores, bias = torch.full_like(scores, 0.5), torch.zeros_like(bias)
    elif case == "coarse":
        scores = torch.randint(1, 4, (50, num_experts)) / 4
        bias = torch.zeros_like(bias)
    weights, indices = routing.group_limited_topk(scores, bias, topk, groups, group_topk, 2.5)
    for t in range(50):
        expected = gate(scores[t].tolist(), bias.tolist(), topk, groups, group_topk)
        assert indices[t].tolist() == expected
        chosen = [scores[t, e].item() for e in expected]
        assert weights[t].tolist() == pytest.approx([2.5 * c / sum(chosen) for c in chosen], rel=1e-6)


def test_a_mask_of_zero_would_leak_dropped_groups() -> None:
    """All biased scores negative: a group masked with 0.0 instead of −inf would win (sglang #3798)."""
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.2, 0.1, 0.3, 0.2]])
    bias = torch.full((8,), -2.0)
    weights, indices = routing.group_limited_topk(scores, bias, 2, 4, 1, 1.0)
    assert indices.tolist() == [[0, 1]]
    biased = (scores + bias).view(1, 4, 2)
    leaky = biased.masked_fill(torch.tensor([[[False], [True], [True], [True]]]), 0.0).flatten(1)
    assert set(leaky.topk(2).indices[0].tolist()) & {0, 1} == set()  # what the wrong mask chooses
    assert torch.allclose(weights, torch.tensor([[0.9 / 1.7, 0.8 / 1.7]]))


def test_v2_lites_gate_is_megatrons_and_plain_python() -> None:
    """Softmax over all experts, the K best, weighed by their scores as they are (no normalisation)."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)) * 2
    scores = routing.affinity(logits, "softmax")
    weights, indices = routing.group_limited_topk(scores, None, 6, 1, 1, 16.0, normalize=False)
    for token, row in enumerate(logits.tolist()):
        largest = sum(math.exp(x) for x in row)
        soft = [math.exp(x) / largest for x in row]
        best = sorted(range(16), key=lambda e: -soft[e])[:6]
        assert indices[token].tolist() == best
        assert weights[token].tolist() == pytest.approx([16 * soft[e] for e in best], rel=1e-5)
    probs, routing_map = routing.to_dense(weights, indices, 16)
    theirs, their_map = topk_routing_with_score_function(
        logits, 6, use_pre_softmax=True, scaling_factor=16.0, score_function="softmax"
    )
    assert torch.equal(routing_map, their_map) and torch.allclose(probs, theirs, rtol=1e-6)


def test_groups_are_scored_by_two_experts_whatever_topk() -> None:
    """topk=2 of 2 groups: Megatron would score groups by their topk // group_topk = 1 best expert."""
    scores = torch.tensor([[0.90, 0.10, 0.60, 0.60, 0.55, 0.55]])
    _, indices = routing.group_limited_topk(scores, None, 2, 3, 2)
    assert indices.tolist() == [[2, 3]]  # groups 1 (1.20) and 2 (1.10); by one best, group 0 would be kept


def test_bias_chooses_but_does_not_weigh_and_gets_no_gradient() -> None:
    scores = torch.tensor([[0.2, 0.9, 0.3, 0.1]], requires_grad=True)
    bias = torch.tensor([1.0, -1.0, 0.0, 1.0], requires_grad=True)
    weights, indices = routing.group_limited_topk(scores, bias, 2, None, None)
    assert indices.tolist() == [[0, 3]]
    assert torch.allclose(weights, torch.tensor([[0.2 / 0.3, 0.1 / 0.3]]))
    weights[0, 0].backward()
    assert bias.grad is None
    assert scores.grad is not None
    # d(a/(a+b))/da = b/(a+b)², d/db = −a/(a+b)²
    assert scores.grad[0].tolist() == pytest.approx([0.1 / 0.09, 0, 0, -0.2 / 0.09], rel=1e-5)


@settings(max_examples=60)
@given(st.data())
def test_any_sizes_match_loops(data) -> None:
    groups = data.draw(st.integers(1, 5))
    size = data.draw(st.integers(2, 5))
    group_topk = data.draw(st.integers(1, groups))
    topk = data.draw(st.integers(1, group_topk * size))
    quarter = st.integers(1, 7).map(lambda n: n / 8)
    num_experts = groups * size
    scores = data.draw(st.lists(quarter, min_size=num_experts, max_size=num_experts))
    bias = data.draw(
        st.lists(st.integers(-16, 8).map(lambda n: n / 8), min_size=num_experts, max_size=num_experts)
    )
    weights, indices = routing.group_limited_topk(
        torch.tensor([scores]), torch.tensor(bias), topk, groups, group_topk, 2.5
    )
    assert indices[0].tolist() == gate(scores, bias, topk, groups, group_topk)
    assert weights.sum().item() == pytest.approx(2.5, rel=1e-5)
    probs, routing_map = routing.to_dense(weights, indices, num_experts)
    assert routing_map.sum().item() == topk
    assert torch.equal(probs.gather(1, indices), weights) and probs[~routing_map].abs().sum() == 0


def test_scores_are_fp32_for_bf16_logits_and_fp64_for_fp64() -> None:
    logits = torch.tensor([1.0, 1.0078125, -30.0])  # exact in bf16; σ of the first two is equal in bf16
    scores = routing.affinity(logits.bfloat16())
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in logits.tolist()], rel=1e-6)
    assert scores[0] != scores[1]
    assert routing.affinity(logits.double()).dtype == torch.float64


def test_underflowed_scores_give_finite_weights() -> None:
    weights, _ = routing.group_limited_topk(routing.affinity(torch.full((1, 4), -200.0)), None, 2, 2, 1)
    assert weights.isfinite().all()


@pytest.mark.parametrize(
    "sizes, option",
    [
        ((8, 9, None, None), "moe_router_topk=9"),
        ((8, 0, None, None), "moe_router_topk=0"),
        ((8, 2, 4, None), "moe_router_group_topk=None"),
        ((8, 2, 3, 1), "moe_router_num_groups=3"),
        ((8, 2, 8, 2), "moe_router_num_groups=8"),
        ((8, 2, 4, 5), "moe_router_group_topk=5"),
        ((8, 5, 4, 2), "raise moe_router_group_topk to 3"),
    ],
)
def test_impossible_sizes_are_refused(sizes, option) -> None:
    with pytest.raises(ValueError, match=option):
        routing.check_routing(*sizes)


@pytest.mark.parametrize("padding", ["none", "uneven", "one sequence empty"])
def test_balance_loss_matches_loops_per_sequence(padding) -> None:
    torch.manual_seed(3)
    s, b, e, k = 10, 3, 8, 2
    scores = torch.rand(s, b, e, dtype=torch.float64) * 0.9 + 0.05
    valid = torch.ones(s, b, dtype=torch.bool)
    if padding == "uneven":
        valid[6:, 0], valid[9:, 2] = False, False
    elif padding == "one sequence empty":
        valid[:, 1] = False
    got = routing.sequence_balance_loss(scores, k, 0.1, None if padding == "none" else valid)
    expected = [
        balance_loss([scores[t, q].tolist() for t in range(s) if valid[t, q]], k, 0.1) for q in range(b)
    ]
    assert got.item() == pytest.approx(sum(expected) / b, rel=1e-12)


def test_balance_loss_of_parts_adds_up_with_its_gradient() -> None:
    torch.manual_seed(4)
    scores = (torch.rand(12, 2, 8, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    valid = torch.rand(12, 2) > 0.3
    whole = routing.sequence_balance_loss(scores, 3, 0.1, valid)
    (gradient,) = torch.autograd.grad(whole, scores)
    parts = [(scores[:5], valid[:5]), (scores[5:], valid[5:])]
    counted = [routing.balance_counts(p, 3, v) for p, v in parts]
    counts = torch.stack([c for c, _ in counted]).sum(0)
    num_tokens = torch.stack([n for _, n in counted]).sum(0)
    split = sum(routing.sequence_balance_loss(p, 3, 0.1, v, counts, num_tokens) for p, v in parts)
    assert split.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(split, scores)[0], gradient, rtol=1e-12)


def test_balance_loss_gradient_is_that_of_finite_differences_with_f_fixed() -> None:
    torch.manual_seed(5)
    scores = (torch.rand(4, 1, 6, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: routing.sequence_balance_loss(x, 2, 0.5), (scores,), eps=1e-7)


def test_counts_are_integers_and_skip_padding() -> None:
    routing_map = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    assert routing.count_tokens(routing_map).tolist() == [2, 2, 2]
    valid = torch.tensor([True, True, False])
    counts = routing.count_tokens(routing_map, valid)
    assert counts.tolist() == [2, 1, 1] and counts.dtype == torch.int64


@pytest.mark.parametrize("base", [0, 2**8, 2**16, 2**24, 2**31, 2**40])
def test_bias_moves_by_the_exact_sign(base) -> None:
    """One token more or less decides, at any count; the second mean is not an integer."""
    counts = torch.tensor([base + 1, base + 3, base + 2, base + 2])
    assert routing.updated_bias(torch.zeros(4), counts, 1.0).tolist() == [1, -1, 0, 0]
    counts = torch.tensor([base + 2, base + 2, base + 2, base + 3])
    assert routing.updated_bias(torch.zeros(4), counts, 1.0).tolist() == [1, 1, 1, -1]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**45), min_size=2, max_size=16))
def test_bias_signs_match_python_integers(counts) -> None:
    mean_times_n = sum(counts)
    expected = [(mean_times_n > len(counts) * c) - (mean_times_n < len(counts) * c) for c in counts]
    assert routing.load_violation_sign(torch.tensor(counts)).tolist() == expected


def test_fp32_counts_would_flip_the_sign() -> None:
    """What the integers are for: 2^24 + 1 is no fp32 number."""
    counts = torch.tensor([2**24 + 1, 2**24, 2**24, 2**24])
    rounded = counts.float()
    assert torch.sign(rounded.mean() - rounded).tolist() == [0, 0, 0, 0]
    assert routing.load_violation_sign(counts).tolist() == [-1, 1, 1, 1]


def test_rate_zero_leaves_the_bias_and_wrong_dtypes_are_refused() -> None:
    bias = torch.tensor([0.1, -0.0, 3e-39])
    counts = torch.tensor([1, 5, 9])
    kept = routing.updated_bias(bias, counts, 0.0)
    assert torch.equal(kept.view(torch.int32), bias.view(torch.int32))
    with pytest.raises(TypeError, match=r"integers.*float32"):
        routing.updated_bias(bias, counts.float(), 0.001)
    with pytest.raises(TypeError, match=r"float32.*bfloat16"):
        routing.updated_bias(bias.bfloat16(), counts, 0.001)


def test_bias_reaches_balance_on_a_skewed_gate() -> None:
    """500 updates on logits that favour the first experts."""
    torch.manual_seed(6)
    logits = torch.randn(512, 16) + torch.linspace(1.5, -1.5, 16)
    scores, bias, violation = routing.affinity(logits), torch.zeros(16), []
    for _ in range(500):
        weights, indices = routing.group_limited_topk(scores, bias, 4, 4, 2)
        counts = routing.count_tokens(routing.to_dense(weights, indices, 16)[1])
        violation.append((counts.max() / counts.float().mean()).item() - 1)
        bias = routing.updated_bias(bias, counts, 0.01)
    assert violation[-1] < 0.1 < violation[0] / 2
