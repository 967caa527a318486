"""EPLB against the published vectors, against a plain version of its description, and over random loads."""

import random
import time

import pytest
import torch
from torch import Tensor

from dsv3_megatron.balance import rebalance_experts
from dsv3_megatron.balance.eplb import pack
from tests.balance.by_hand import rebalance

PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


@pytest.mark.parametrize("as_given", [torch.tensor, list])
def test_published_example(as_given):
    phy2log, log2phy, logcnt = rebalance_experts(as_given(PUBLISHED), 16, 4, 2, 8)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert log2phy[0].tolist() == [
        *([12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2]),
        *([1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]),
    ]
    assert logcnt[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert {t.dtype for t in (phy2log, log2phy, logcnt)} == {torch.int64}


def test_published_global_policy():
    phy2log, _, _ = rebalance_experts(PUBLISHED, 16, 4, 3, 8)
    assert phy2log[0].tolist() == [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1]


def test_shared_expert_as_a_257th_gets_the_reports_32_copies():
    """Decode of the report (§3.4.2): 320 GPUs of one expert, 64 of them for redundant and shared experts."""
    load = torch.full((1, 257), 8.0)
    load[0, 256] = 256.0  # chosen by every token
    _, _, logcnt = rebalance_experts(load, 320, 1, 1, 320)
    assert logcnt[0, 256] == 32
    assert (logcnt[0, :256] == 2).sum() == 32 and logcnt[0, :256].max() == 2


def test_a_whole_model_takes_well_under_a_second():
    load = torch.rand(58, 256)
    begun = time.perf_counter()
    rebalance_experts(load, 288, 8, 4, 32)
    assert time.perf_counter() - begun < 0.5


def random_load(kind: int, layers: int, experts: int) -> Tensor:
    """Even, tied whole numbers, or a few experts with most of the load."""
    if kind == 0:
        return torch.rand(layers, experts) * 100
    if kind == 1:
        return torch.randint(0, 10, (layers, experts)).float()
    return (torch.randn(layers, experts) * 2).exp()


def random_case(draw: random.Random) -> tuple[int, int, int, int, int]:
    """Experts, replicas, groups, nodes, GPUs; a quarter of them is for the global policy."""
    nodes, groups_per_node = draw.choice([1, 1, 2, 3, 4]), draw.choice([1, 2])
    gpus, groups = nodes * draw.choice([1, 2, 3, 4]), nodes * groups_per_node
    experts = groups * draw.choice([1, 2, 3, 4, 6, 8])
    replicas = gpus * (-(-experts // gpus) + draw.choice([0, 0, 1, 2, 3]))
    return (
        experts,
        replicas,
        groups,
        nodes + 1 if groups % (nodes + 1) and draw.random() < 0.25 else nodes,
        gpus,
    )


@pytest.mark.parametrize("cases", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_equal_to_the_plain_version_on_random_cases(cases):
    torch.manual_seed(cases)
    draw = random.Random(cases)
    for case in range(cases):
        experts, *numbers = random_case(draw)
        load = random_load(case % 3, 2, experts)
        phy2log, log2phy, logcnt = rebalance_experts(load, *numbers)
        for layer in range(2):
            slots, of_expert, count = rebalance(load[layer].tolist(), *numbers)
            assert phy2log[layer].tolist() == slots, (case, experts, numbers)
            assert [[s for s in row if s >= 0] for row in log2phy[layer].tolist()] == of_expert
            assert logcnt[layer].tolist() == count


def test_invariants_on_10000_random_cases():
    torch.manual_seed(1)
    draw = random.Random(1)
    layers = 20
    for case in range(10_000 // layers):
        experts, replicas, groups, nodes, gpus = random_case(draw)
        load = random_load(case % 3, layers, experts)
        phy2log, log2phy, logcnt = rebalance_experts(load, replicas, groups, nodes, gpus)
        # Every expert is somewhere, as often as it is counted, and the two maps are each other's inverse.
        assert torch.equal(
            logcnt, torch.zeros_like(logcnt).scatter_add_(1, phy2log, torch.ones_like(phy2log))
        )
        assert logcnt.min() >= 1 and bool((logcnt.sum(1) == replicas).all())
        assert torch.equal((log2phy >= 0).sum(2), logcnt) and log2phy.min() >= -1
        rows, of_expert, copy = (log2phy >= 0).nonzero(as_tuple=True)
        assert torch.equal(phy2log[rows, log2phy[rows, of_expert, copy]], of_expert)
        assert bool((copy < logcnt[rows, of_expert]).all())  # copies first, padding after
        if groups % nodes == 0:  # the copies of an expert group stay on one node
            node = torch.arange(replicas) // (replicas // nodes)
            of_group = phy2log // (experts // groups)
            for group in range(groups):
                held = torch.where(of_group == group, node, -1)
                assert torch.equal(held.amax(1), torch.where(held < 0, nodes, held).amin(1))


def loads_of_gpus(load: Tensor, phy2log: Tensor, logcnt: Tensor, gpus: int) -> Tensor:
    return (load / logcnt).gather(1, phy2log).view(len(load), gpus, -1).sum(2)


def nodes_of_eight(draw: random.Random) -> tuple[int, int, int, int, int]:
    """Experts, replicas, groups, nodes, GPUs; two experts or more on each."""
    nodes = draw.choice([1, 2, 4])
    groups, gpus = nodes * draw.choice([1, 2]), nodes * 8
    experts = gpus * draw.choice([2, 4, 8])
    return experts, gpus * (experts // gpus + draw.choice([0, 1, 2])), groups, nodes, gpus


@pytest.mark.parametrize(
    ("layout", "seed", "worse", "by", "mean"),
    [(nodes_of_eight, 2, 10, 1.02, 0.85), (random_case, 2, 200, 1.15, 0.95)],
    ids=["nodes of eight", "any"],
)
def test_against_the_naive_packing_on_10000_cases(layout, seed, worse, by, mean):
    """The same copies in the order of the experts.

    The published packing is greedy, so "never worse" is not a theorem (next test): on nodes of eight GPUs it is worse
    in a case of some thousands, by up to 2%; with few GPUs and experts in one of a hundred, by up to 13%.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    layers, ratios = 20, []
    for case in range(10_000 // layers):
        experts, replicas, groups, nodes, gpus = layout(draw)
        load = random_load(case % 3, layers, experts) + 0.01
        phy2log, _, logcnt = rebalance_experts(load, replicas, groups, nodes, gpus)
        parts = nodes if groups % nodes == 0 else 1
        naive = phy2log.view(layers, parts, -1).sort(2).values.flatten(1)
        here, there = (loads_of_gpus(load, slots, logcnt, gpus).amax(1) for slots in (phy2log, naive))
        ratios.append(here / there)
    ratio = torch.cat(ratios)
    assert 0 < (ratio > 1 + 1e-6).sum() <= worse and ratio.max() < by
    assert ratio.mean() < mean


def test_the_published_packing_is_greedy_and_can_lose_to_the_naive_one():
    """Training's placement (placement.py) refines it and cannot lose."""
    weight = torch.tensor([[5.0, 1, 1, 3, 2, 2]])
    load = torch.zeros(1, 2).scatter_add_(1, pack(weight, 2)[0], weight)
    assert load.max() == 8 and weight.view(2, 3).sum(1).max() == 7


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((17, 4, 2, 8), "num_replicas=17 is not a multiple of num_gpus=8"),
        ((8, 4, 2, 8), "num_replicas=8 is fewer than the 12 experts"),
        ((16, 5, 1, 8), "12 experts: not a multiple of num_groups=5"),
        ((18, 4, 2, 9), "num_gpus=9 is not a multiple of num_nodes=2"),
        ((16, 0, 2, 8), "num_groups=0, num_nodes=2"),
    ],
)
def test_wrong_numbers(numbers, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(PUBLISHED, *numbers)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_wrong_loads(wrong):
    with pytest.raises(ValueError, match="negative or not finite"):
        rebalance_experts([[1.0, 2.0, wrong, 4.0]], 4, 1, 1, 2)
    with pytest.raises(ValueError, match="give \\[layers, experts\\]"):
        rebalance_experts(torch.ones(4), 4, 1, 1, 2)
    for none in ([], [[]], torch.zeros(0, 4), "loads", None, [[1, 2], [3]]):
        with pytest.raises(ValueError, match="give \\[layers, experts\\]"):
            rebalance_experts(none, 4, 1, 1, 2)


def test_loads_whose_sum_is_beyond_fp32_lose_no_expert():
    phy2log, _, logcnt = rebalance_experts([[3e38, 3e38, 3e38, 3e38, 1, 1, 1, 1]], 8, 1, 1, 2)
    assert sorted(phy2log[0].tolist()) == list(range(8)) and logcnt.tolist() == [[1] * 8]
