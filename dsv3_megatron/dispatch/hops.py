"""Rows through two hops, there and back, chunk by chunk; and their gradients.

`spread` carries each token to its experts, `gather` adds up what comes back; each is the other's transpose, so that
combine is the transpose of dispatch, and their backward passes are these two again. The first hop of all chunks is
started at once; a chunk goes on over the second hop as soon as it is here, beside the first hop of the next.

Towards the experts rows are E4M3 where the recipe says so (the gradient before the down projection too), back they are
in the model's precision; sums are fp32 (fp64 in an fp64 model), in an order that depends on nothing but the routing.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.dispatch import wire
from dsv3_megatron.dispatch.links import Links
from dsv3_megatron.dispatch.route import (
    Counts,
    Forwarded,
    Grid,
    Received,
    Sent,
    Splits,
    add_rows,
    first_true,
    forwarded,
    received,
)

__all__ = ["Combine", "Dispatch", "Route", "SumRows", "TakeRows"]


@dataclass
class Route:
    """One pass of one microbatch through one layer: who sends what where. Filled on the way to the experts.

    Attributes:
        most: experts of a row at most, and so the weights that go with it.
        fp8: whether rows go to the experts in E4M3.
        expert_of_slot: [E], the expert of each slot where experts are not at home.
        gates, receipts: of each chunk, once its rows have been here.
    """

    grid: Grid
    links: Links
    counts: Counts
    sent: Sent
    most: int
    fp8: bool
    expert_of_slot: Tensor | None = None
    gates: list[Forwarded] = field(default_factory=list)
    receipts: list[Received] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.splits: list[Splits] = [self.counts.hops(self.grid, c) for c in range(self.grid.num_chunks)]

    def eps(self, floor: float) -> float | None:
        """Of rows on their way to the experts; see `wire.encode`."""
        return floor if self.fp8 else None

    @property
    def pair_bounds(self) -> list[tuple[int, int]]:
        """Of each chunk among the pairs that this rank's experts get."""
        return _bounds([sum(splits.pairs_in) for splits in self.splits])

    @property
    def row_bounds(self) -> list[tuple[int, int]]:
        """Of each chunk among the rows that this rank sends as a source."""
        return _bounds([sum(splits.rail_out) for splits in self.splits])


def _bounds(sizes: list[int]) -> list[tuple[int, int]]:
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return list(pairwise(edges))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dispatch(route: Route, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, h] and weights [n, K] of a source → pairs [p, h] and their weights [p] at the receivers."""
    eps, grid, bits = route.eps(1e-4), route.grid, torch.uint8
    payload = (wire.width(rows.shape[1], rows.dtype, eps), torch.uint8)
    on_rail = [
        route.links.rail.exchange(
            wire.join(wire.encode(rows[lo:hi], eps), weights[lo:hi], route.sent.bits[lo:hi]),
            splits.rail_out,
            splits.rail_in,
        )
        for splits, (lo, hi) in zip(route.splits, route.row_bounds, strict=True)
    ]
    in_node = []
    for splits, pending in zip(route.splits, on_rail, strict=True):
        columns = (payload, (route.most, weights.dtype), (-(-grid.per_node // 8), bits))
        token, weight, experts = wire.split(pending.wait(), *columns)
        gate = forwarded(experts, splits, grid, route.expert_of_slot)
        order, valid = first_true(gate.mask, route.most)
        of_slot = weight.new_zeros(len(weight), grid.per_node).scatter_(1, order, weight * valid)
        of_rank = of_slot.view(len(weight), grid.node_size, grid.per_rank)[gate.row, gate.rank]
        message = wire.join(token[gate.row], of_rank, gate.bits)
        in_node.append(route.links.node.exchange(message, splits.node_out, splits.node_in))
        route.gates.append(gate)
    pairs, of_pairs = [], []
    for splits, pending in zip(route.splits, in_node, strict=True):
        columns = (payload, (grid.per_rank, weights.dtype), (-(-grid.per_rank // 8), bits))
        token, weight, experts = wire.split(pending.wait(), *columns)
        receipt = received(experts, splits, grid)
        pairs.append(wire.decode(token, rows.shape[1], rows.dtype, eps)[receipt.row])
        of_pairs.append(weight[receipt.row, receipt.expert])
        route.receipts.append(receipt)
    return torch.cat(pairs), torch.cat(of_pairs)


def spread(route: Route, rows: Tensor) -> Tensor:
    """Gradients of rows [n, h] → of the pairs [p, h] that were added up in them; the way is known."""
    eps = route.eps(0.0)
    on_rail = [
        route.links.rail.exchange(wire.encode(rows[lo:hi], eps), splits.rail_out, splits.rail_in)
        for splits, (lo, hi) in zip(route.splits, route.row_bounds, strict=True)
    ]
    in_node = [
        route.links.node.exchange(pending.wait()[gate.row], splits.node_out, splits.node_in)
        for splits, gate, pending in zip(route.splits, route.gates, on_rail, strict=True)
    ]
    return torch.cat(
        [
            wire.decode(pending.wait(), rows.shape[1], rows.dtype, eps)[receipt.row]
            for receipt, pending in zip(route.receipts, in_node, strict=True)
        ]
    )


def gather(route: Route, pairs: Tensor, scalars: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Pairs [p, h] → rows [n, h] at their sources, sums over the experts of a node; scalars [p] → [n, K]."""
    hidden, grid, total = pairs.shape[1], route.grid, _sum_dtype(pairs.dtype)
    in_node = []
    for splits, (lo, hi) in zip(route.splits, route.pair_bounds, strict=True):
        parts = [pairs[lo:hi]] if scalars is None else [pairs[lo:hi], scalars[lo:hi].unsqueeze(1)]
        in_node.append(route.links.node.exchange(wire.join(*parts), splits.pairs_in, splits.pairs_out))
    on_rail = []
    for splits, gate, pending in zip(route.splits, route.gates, in_node, strict=True):
        columns = [(hidden, pairs.dtype)] if scalars is None else [(hidden, pairs.dtype), (1, scalars.dtype)]
        came = wire.split(pending.wait(), *columns)
        back = [gate.sums(came[0], total).to(pairs.dtype)]
        if scalars is not None:
            of_slot = scalars.new_zeros(len(gate.mask), grid.per_node)
            of_slot[gate.row_of_pair, gate.slot_of_pair] = came[1][:, 0]
            order, valid = first_true(gate.mask, route.most)
            back.append(of_slot.gather(1, order) * valid)
        on_rail.append(route.links.rail.exchange(wire.join(*back), splits.rail_in, splits.rail_out))
    columns = [(hidden, pairs.dtype)] + ([] if scalars is None else [(route.most, scalars.dtype)])
    arrived = [wire.split(pending.wait(), *columns) for pending in on_rail]
    rows = torch.cat([parts[0] for parts in arrived])
    return rows, None if scalars is None else torch.cat([parts[1] for parts in arrived])


class Dispatch(torch.autograd.Function):
    """rows [n, h], weights [n, K] → pairs [p, h], weights [p]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, route: Route) -> tuple[Tensor, Tensor]:
        ctx.route = route
        return dispatch(route, rows, weights)

    @staticmethod
    def backward(ctx: Any, pairs: Tensor, scalars: Tensor) -> tuple[Tensor | None, ...]:
        return *gather(ctx.route, pairs, scalars), None


class Combine(torch.autograd.Function):
    """pairs [p, h] → rows [n, h], the sum over each row's experts."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return gather(route, pairs)[0]

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        return spread(ctx.route, rows), None


class TakeRows(torch.autograd.Function):
    """tokens [T, h] → rows [n, h], a token's row for each of its nodes; backward sums in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.num_tokens = index, len(tokens)
        return tokens[index]

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows(rows, ctx.index, ctx.num_tokens), None


class SumRows(torch.autograd.Function):
    """rows [n, h] → tokens [T, h], the sum over each token's nodes, in fp32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_tokens: int) -> Tensor:
        ctx.index = index
        return sum_rows(rows, index, num_tokens)

    @staticmethod
    def backward(ctx: Any, tokens: Tensor) -> tuple[Tensor | None, ...]:
        return tokens[ctx.index], None, None


def sum_rows(rows: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """[T, h] from rows [n, h] and their tokens [n]; nodes in their order."""
    dtype = _sum_dtype(rows.dtype)
    total = torch.zeros(num_tokens, rows.shape[1], dtype=dtype, device=rows.device)
    return add_rows(total, index, rows.to(dtype)).to(rows.dtype)
