"""Expected bytes: against the closed forms that are known, and against routings that are counted one by one."""

import math

import pytest
import torch

from dsv3_megatron.dispatch import expected_bytes
from dsv3_megatron.dispatch.volume import Layout, Row, counted_bytes, expected_copies
from dsv3_megatron.specs.routing import group_limited_topk, to_dense

V3 = {"tokens": 4096, "topk": 8, "nodes": 8, "node_limit": 4}


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_infiniband_is_at_most_half_of_alltoalls(dtype):
    ours, theirs = (expected_bytes(**V3, dtype=dtype, dispatcher=name) for name in ("two_hop", "alltoall"))
    assert ours.infiniband <= 0.5 * theirs.infiniband
    assert (
        ours.infiniband > 0.48 * theirs.infiniband
    )  # 4 nodes against 8 experts: the bound is met, not beaten


def test_v3_by_hand():
    """Nearly every token reaches all four nodes of its four groups; an eighth of them is its own."""
    link = expected_bytes(**V3, dtype=torch.bfloat16)
    row, weights, bits = 7168 * 2, 8 * 4, 32 // 8
    assert link.dispatch[0] == pytest.approx(4096 * 4 * 7 / 8 * (row + weights + bits), rel=0.01)
    assert link.combine[0] == pytest.approx(4096 * 4 * 7 / 8 * row, rel=0.01)
    assert link.dispatch_backward[0] == pytest.approx(4096 * 4 * 7 / 8 * (row + weights), rel=0.01)
    assert link.combine[1] == pytest.approx(4096 * 8 * 7 / 8 * row)
    fp8 = expected_bytes(**V3, dtype="fp8")
    assert fp8.dispatch[0] == pytest.approx(4096 * 4 * 7 / 8 * (7168 + 56 + weights + bits), rel=0.01)
    assert fp8.combine == link.combine
    everywhere = expected_bytes(4096, 8, 8, None, "bf16")
    reached = 8 * (1 - math.comb(224, 8) / math.comb(256, 8))
    assert everywhere.combine[0] == pytest.approx(4096 * reached * 7 / 8 * row)
    assert everywhere.infiniband > 1.3 * link.infiniband  # what the node limit saves


CASES = [
    (256, 8, 8, 4, 8, 8),
    pytest.param(256, 8, 8, 8, 4, 8, marks=pytest.mark.slow),
    (64, 6, 8, 4, 4, 2),
    (16, 4, 4, 2, 2, 2),
    (16, 4, 1, 1, 2, 4),
]


@pytest.mark.parametrize(("experts", "topk", "groups", "group_topk", "nodes", "ranks_per_node"), CASES)
@pytest.mark.parametrize("dispatcher", ["two_hop", "alltoall", "flex"])
def test_expectation_against_counted_routings(
    experts, topk, groups, group_topk, nodes, ranks_per_node, dispatcher
):
    """The router's own choice for scores of another kind than those of the expectation, summed over all sources."""
    torch.manual_seed(1)
    layout = Layout(experts, nodes, ranks_per_node)
    tokens = 40_000 // layout.ranks  # enough that the counts are within a few tenths of a percent
    counted = torch.zeros(4, 2)
    for source in range(layout.ranks):
        scores = torch.sigmoid(torch.randn(tokens, experts) * 0.3)
        weights, indices = group_limited_topk(scores, None, topk, groups, group_topk, 1.0)
        _, routing_map = to_dense(weights, indices, experts)
        found = counted_bytes(routing_map, source, layout, topk, Row(64, "fp8"), dispatcher)
        counted += torch.tensor(
            [found.dispatch, found.combine, found.dispatch_backward, found.combine_backward]
        )
    wanted = expected_bytes(
        tokens * layout.ranks,
        topk,
        nodes,
        group_topk,
        "fp8",
        hidden=64,
        experts=experts,
        ranks_per_node=ranks_per_node,
        groups=groups,
        dispatcher=dispatcher,
    )
    parts = (wanted.dispatch, wanted.combine, wanted.dispatch_backward, wanted.combine_backward)
    torch.testing.assert_close(counted, torch.tensor(parts), rtol=0.01, atol=0)


def test_one_node_needs_no_infiniband_and_one_rank_per_node_no_nvlink():
    assert expected_bytes(100, 4, 1, None, "bf16", experts=16, ranks_per_node=4).infiniband == 0
    assert expected_bytes(100, 4, 4, None, "bf16", experts=16, ranks_per_node=1).nvlink == 0


def test_wrong_numbers():
    with pytest.raises(ValueError, match="16 experts do not lie evenly on 3 × 1 ranks"):
        Layout(16, 3, 1)
    with pytest.raises(ValueError, match="9 of 16 experts in 2 of 4 groups: impossible"):
        expected_copies(Layout(16, 2, 2), 9, 4, 2)
    with pytest.raises(ValueError, match="dtype=fp7: use fp8"):
        expected_bytes(1, 1, 1, None, "fp7")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": -1}, "tokens=-1: give a whole number, 0 or more"),
        *(
            ({name: 0}, f"{name}=0: give a whole number, 1 or more")
            for name in ("topk", "nodes", "node_limit", "hidden", "experts", "ranks_per_node", "groups")
        ),
        ({"nodes": 3}, "256 experts do not lie evenly on 3 × 8 ranks"),
        ({"groups": 3}, "8 of 256 experts in 4 of 3 groups: impossible"),
        ({"dispatcher": "deepep"}, "dispatcher=deepep: use two_hop, alltoall, flex"),
    ],
)
def test_what_is_no_layout_is_refused(wrong, message):
    right = {"tokens": 16, "topk": 8, "nodes": 8, "node_limit": 4, "dtype": "bf16"}
    expected_bytes(**right)
    with pytest.raises(ValueError, match=message):
        expected_bytes(**{**right, **wrong})


def test_no_tokens_and_a_limit_that_does_not_bind():
    assert expected_bytes(0, 8, 8, 4, "bf16").step == (0, 0)
    assert expected_bytes(16, 8, 2, 4, torch.float8_e4m3fn) == expected_bytes(16, 8, 2, None, "fp8")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": float("nan")},
        {"tokens": "5"},
        {"tokens": -1},
        {"topk": 1.5},
        {"nodes": 0},
        {"hidden": "7168"},
    ],
    ids=str,
)
def test_what_is_no_count_is_refused_by_name(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}=.*: give a whole number"):
        expected_bytes(**(V3 | {"dtype": "bf16"} | wrong))
