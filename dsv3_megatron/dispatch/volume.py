"""Bytes of dispatch and combine over each kind of link, expected and counted from a routing. Pure.

A rank's tokens T go to `topk` of E experts on N nodes of S ranks each. What crosses which link, per token:

    alltoall   a copy per expert                                    the whole way over one link
    two_hop    a copy per node over InfiniBand, to the rank with the same index there, and from it a copy per rank over
               NVLink; back, a row per expert over NVLink and a sum per node over InfiniBand
    flex       DeepEP: the same two hops, with a sum per rank on the way back

A copy is a row of the hidden size and what goes with it: weights, and for two_hop a bit per expert of the node or rank.
"""

import functools
from dataclasses import dataclass
from math import comb
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # only what draws or counts a routing needs it at run time
    import torch
    from torch import Tensor

__all__ = ["Layout", "LinkBytes", "Row", "counted_bytes", "expected_bytes", "expected_copies"]

Dispatcher = Literal["two_hop", "alltoall", "flex"]
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_TORCH = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32", "torch.float64": "fp64"}
_TORCH["torch.float8_e4m3fn"] = "fp8"
_DRAWS = 20_000  # tokens that are drawn where no closed form is known: three digits


@dataclass(frozen=True)
class LinkBytes:
    """Bytes that a rank sends to others over each kind of link in one MoE layer, for all of its tokens.

    Attributes:
        dispatch, combine: of the forward pass, as (InfiniBand, NVLink).
        dispatch_backward: gradients of the experts' inputs on their way back to the tokens.
        combine_backward: gradients of the experts' outputs on their way to the experts.
    """

    dispatch: tuple[float, float]
    combine: tuple[float, float]
    dispatch_backward: tuple[float, float]
    combine_backward: tuple[float, float]

    @property
    def forward(self) -> tuple[float, float]:
        return _add(self.dispatch, self.combine)

    @property
    def step(self) -> tuple[float, float]:
        """Forward and backward, as (InfiniBand, NVLink)."""
        return _add(self.forward, self.dispatch_backward, self.combine_backward)

    @property
    def infiniband(self) -> float:
        return self.step[0]

    @property
    def nvlink(self) -> float:
        return self.step[1]


@dataclass(frozen=True)
class Layout:
    """E experts in order over N nodes of S ranks."""

    experts: int
    nodes: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.experts % self.ranks:
            raise ValueError(
                f"{self.experts} experts do not lie evenly on {self.nodes} × {self.ranks_per_node} ranks"
            )

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Row:
    """Bytes of one row on its way.

    Attributes:
        hidden: hidden size.
        dtype: "bf16", "fp32", "fp64", or "fp8": E4M3 with an exponent per 128 towards the experts, bf16 back.
        weight: bytes of a router's weight.
    """

    hidden: int
    dtype: str
    weight: int = 4

    @property
    def to_experts(self) -> int:
        return self.hidden + -(-self.hidden // 128) if self.dtype == "fp8" else self.back

    @property
    def back(self) -> int:
        return self.hidden * (2 if self.dtype == "fp8" else _SIZES[self.dtype])


def expected_bytes(
    tokens: int,
    topk: int,
    nodes: int,
    node_limit: int | None,
    dtype: "str | torch.dtype",
    *,
    hidden: int = 7168,
    experts: int = 256,
    ranks_per_node: int = 8,
    groups: int | None = None,
    dispatcher: Dispatcher = "two_hop",
) -> LinkBytes:
    """What a rank is expected to send for `tokens` tokens whose experts are as good as random.

    Args:
        topk: experts of a token.
        nodes: that the expert-parallel group lies on.
        node_limit: groups of experts that a token may choose from (`--moe-router-group-topk`); None: all. Where
            `groups` are not given: nodes, and as many as there are is no limit.
        dtype: see `Row`; a torch dtype is taken too.
        groups: groups of experts (`--moe-router-num-groups`), one per node by default.

    Raises:
        ValueError: a number, the dtype or the dispatcher is none, or experts do not lie evenly on ranks and groups.
    """
    counts = {"topk": topk, "nodes": nodes, "node_limit": node_limit, "hidden": hidden, "experts": experts}
    counts |= {"ranks_per_node": ranks_per_node, "groups": groups}
    if not isinstance(tokens, Integral) or tokens < 0:
        raise ValueError(f"{tokens=}: give a whole number, 0 or more")
    for argument, number in counts.items():
        if number is not None and not (isinstance(number, Integral) and number >= 1):
            raise ValueError(f"{argument}={number!r}: give a whole number, 1 or more")
    name = _TORCH.get(str(dtype), str(dtype))
    if name != "fp8" and name not in _SIZES:
        raise ValueError(f"dtype={dtype}: use fp8, {', '.join(_SIZES)} or a torch dtype of these")
    layout = Layout(experts, nodes, ranks_per_node)
    if groups is None:
        groups, node_limit = nodes, min(node_limit or nodes, nodes)
    copies = expected_copies(layout, topk, groups, node_limit or groups)
    return _bytes(tokens, topk, layout, copies, Row(hidden, name), dispatcher)


def counted_bytes(
    routing_map: "Tensor",
    source: int,
    layout: Layout,
    topk: int,
    row: Row,
    dispatcher: Dispatcher = "two_hop",
) -> LinkBytes:
    """What rank `source` sends for its tokens' routing [T, E] bool, to the byte, whatever the ranks beside it do.

    The second hop is counted as if the rank itself forwarded what it sends: in the sum over all ranks that is exact.
    """
    tokens = len(routing_map)
    at_rank = routing_map.unflatten(1, (layout.nodes, layout.ranks_per_node, layout.experts // layout.ranks))
    node, index = divmod(source, layout.ranks_per_node)
    ranks, pairs = at_rank.any(3), at_rank.sum(3)
    elsewhere = [n for n in range(layout.nodes) if n != node]
    beside = [i for i in range(layout.ranks_per_node) if i != index]
    copies = Copies(
        nodes=float(ranks.any(2)[:, elsewhere].sum()) / max(1, tokens),
        ranks=float(ranks[:, :, beside].sum()) / max(1, tokens),
        pairs=float(pairs[:, :, beside].sum()) / max(1, tokens),
        far=float(pairs[:, elsewhere].sum()) / max(1, tokens),
        near=float(pairs[:, node][:, beside].sum()) / max(1, tokens),
    )
    return _bytes(tokens, topk, layout, copies, row, dispatcher)


@dataclass(frozen=True)
class Copies:
    """Copies of a token that leave a rank, on the average.

    Attributes:
        nodes: other nodes with one of its experts.
        ranks: ranks with one of its experts, of all nodes, but for those with the index of the token's own rank.
        pairs: experts on such ranks.
        far, near: experts on other nodes, and on other ranks of the token's node.
    """

    nodes: float
    ranks: float
    pairs: float
    far: float
    near: float


def expected_copies(layout: Layout, topk: int, groups: int, group_topk: int) -> Copies:
    """Of a token whose experts have independent random scores, and whose rank is any."""
    if not group_topk <= groups or layout.experts % groups or topk > layout.experts // groups * group_topk:
        raise ValueError(f"{topk} of {layout.experts} experts in {group_topk} of {groups} groups: impossible")
    nodes, ranks = _distinct(layout.experts, topk, groups, group_topk, layout.nodes, layout.ranks)
    other_node, other_index = 1 - 1 / layout.nodes, 1 - 1 / layout.ranks_per_node
    return Copies(
        nodes=nodes * other_node,
        ranks=ranks * other_index,
        pairs=topk * other_index,
        far=topk * other_node,
        near=topk / layout.nodes * other_index,
    )


@functools.cache
def _distinct(
    experts: int, topk: int, groups: int, group_topk: int, nodes: int, ranks: int
) -> tuple[float, float]:
    """Expected number of nodes and of ranks with one of a token's experts."""
    if (
        group_topk == groups
    ):  # any `topk` experts: a place is missed with the odds of drawing none of its experts

        def hit(places: int) -> float:
            return places * (1 - comb(experts - experts // places, topk) / comb(experts, topk))

        return hit(nodes), hit(ranks)
    # The groups with the best sums of two, and in them the best experts (report §2.1.2): drawn.
    import torch

    generator = torch.Generator().manual_seed(0)
    scores = torch.sigmoid(torch.randn(_DRAWS, groups, experts // groups, generator=generator))
    group_score = scores.topk(min(2, scores.shape[2]), 2).values.sum(2)
    allowed = torch.zeros_like(group_score, dtype=torch.bool)
    allowed.scatter_(1, group_score.topk(group_topk, 1).indices, True)
    best = scores.masked_fill(~allowed.unsqueeze(2), -1).flatten(1).topk(topk, 1).indices
    chosen = torch.zeros(_DRAWS, experts, dtype=torch.bool).scatter_(1, best, True)
    hits = [chosen.unflatten(1, (places, -1)).any(2).sum().item() / _DRAWS for places in (nodes, ranks)]
    return hits[0], hits[1]


def _bytes(
    tokens: int, topk: int, layout: Layout, copies: Copies, row: Row, dispatcher: Dispatcher
) -> LinkBytes:
    if dispatcher not in get_args(Dispatcher):
        raise ValueError(f"dispatcher={dispatcher}: use {', '.join(get_args(Dispatcher))}")
    there, back, weight = row.to_experts, row.back, row.weight
    if dispatcher == "alltoall":
        links = (tokens * copies.far, tokens * copies.near)
        return LinkBytes(
            _times(links, there + weight),
            _times(links, back),
            _times(links, back + weight),
            _times(links, there),
        )
    per_node, per_rank = layout.experts // layout.nodes, layout.experts // layout.ranks
    weights = min(topk, per_node) * weight
    if dispatcher == "flex":
        links = (tokens * copies.nodes, tokens * copies.ranks)
        rows = there + topk * (weight + 8)  # every copy has all weights and indices (int64)
        return LinkBytes(
            _times(links, rows),
            _times(links, back),
            _times(links, back + topk * weight),
            _times(links, there),
        )
    ib, to_rank, from_rank = tokens * copies.nodes, tokens * copies.ranks, tokens * copies.pairs
    return LinkBytes(
        (ib * (there + weights + _bits(per_node)), to_rank * (there + per_rank * weight + _bits(per_rank))),
        (ib * back, from_rank * back),
        (ib * (back + weights), from_rank * (back + weight)),
        (ib * there, to_rank * there),
    )


def _bits(experts: int) -> int:
    """Bytes of a bit per expert."""
    return -(-experts // 8)


def _times(links: tuple[float, float], size: float) -> tuple[float, float]:
    return links[0] * size, links[1] * size


def _add(*parts: tuple[float, float]) -> tuple[float, float]:
    return sum(part[0] for part in parts), sum(part[1] for part in parts)
