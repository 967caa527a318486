"""Which row goes where in two hops: index arithmetic on routing maps. Pure, no communication.

A rank is (node n, index i). It plays three parts:

    source      has tokens; sends each, once per node with one of its experts, to the rank (that node, i)
    gateway     (n, i) gets rows for node n from the sources (every node, i) and forwards them to ranks (n, every j)
    receiver    (n, j) gets rows from the gateways (n, every i) and makes a pair of each row and each of its experts

Back, a pair goes to the gateway, which adds up the pairs of a row in the order of the experts' numbers in the model;
the sum goes to the source, which adds up the nodes' in their order.

Tokens are cut into chunks, so that one chunk's second hop runs beside the next one's first. Everywhere rows are in the
order chunk, (rank that they come from or go to), token; pairs of a row in the order of experts.

Suffixes: T tokens, E experts of the model, N nodes, S ranks of a node, L experts of a rank, C chunks.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "Counts",
    "Forwarded",
    "Grid",
    "Received",
    "Sent",
    "Splits",
    "add_rows",
    "expert_order",
    "first_true",
    "forwarded",
    "received",
    "sent",
]


@dataclass(frozen=True)
class Grid:
    """Where a rank stands in its expert-parallel group, and how the group lies on nodes.

    Attributes:
        num_nodes, node_size: N × S ranks; rank n·S + i is index i of node n.
        node, index: this rank.
        num_experts: E, a multiple of the ranks; rank r holds slots r·L and following.
        num_chunks: C.
    """

    num_nodes: int
    node_size: int
    node: int
    index: int
    num_experts: int
    num_chunks: int = 1

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.node_size

    @property
    def per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def per_node(self) -> int:
        return self.num_experts // self.num_nodes


def chunk_bounds(tokens: int, chunks: int) -> list[tuple[int, int]]:
    """First and last (exclusive) token of each chunk; some are empty where there are fewer tokens."""
    edges = [tokens * c // chunks for c in range(chunks + 1)]
    return list(pairwise(edges))


@dataclass(frozen=True)
class Counts:
    """What every rank of the group sends, known to all: the one message before the tokens.

    Attributes:
        rows: [ranks, C, N], a source's rows for each node.
        forwards: [ranks, C, ranks], those of its rows that go on to each rank.
        pairs: [ranks, C, ranks], (row, expert) pairs there.
        experts: [ranks, E], its tokens for each slot.
    All int on the CPU.
    """

    rows: Tensor
    forwards: Tensor
    pairs: Tensor
    experts: Tensor

    @staticmethod
    def own(routing_map_TE: Tensor, grid: Grid) -> Tensor:
        """This rank's line of the tables, [C·N + 2·C·ranks + E] int32."""
        at_rank = routing_map_TE.unflatten(1, (grid.num_ranks, grid.per_rank))
        held, pairs = at_rank.any(2), at_rank.sum(2, dtype=torch.int32)
        node = held.unflatten(1, (grid.num_nodes, grid.node_size)).any(2)
        bounds = chunk_bounds(len(routing_map_TE), grid.num_chunks)

        def by_chunk(flags: Tensor) -> Tensor:
            return torch.stack([flags[lo:hi].sum(0, dtype=torch.int32) for lo, hi in bounds]).flatten()

        return torch.cat(
            [by_chunk(node), by_chunk(held), by_chunk(pairs), routing_map_TE.sum(0, dtype=torch.int32)]
        )

    @classmethod
    def of(cls, lines: Tensor, grid: Grid) -> "Counts":
        """From the lines of all ranks [ranks, …]."""
        c, n, p = grid.num_chunks, grid.num_nodes, grid.num_ranks
        rows, forwards, pairs, experts = lines.cpu().split([c * n, c * p, c * p, grid.num_experts], dim=1)
        return cls(rows.view(p, c, n), forwards.view(p, c, p), pairs.view(p, c, p), experts)

    def hops(self, grid: Grid, chunk: int) -> "Splits":
        """Rows of a chunk on each hop."""
        me = grid.node * grid.node_size + grid.index
        rail = [n * grid.node_size + grid.index for n in range(grid.num_nodes)]
        node = range(grid.node * grid.node_size, (grid.node + 1) * grid.node_size)
        forwards, pairs = self.forwards[:, chunk], self.pairs[:, chunk]
        # sources[j] are those whose rows come through the gateway with index j
        sources = [[n * grid.node_size + j for n in range(grid.num_nodes)] for j in range(grid.node_size)]
        return Splits(
            rail_out=self.rows[me, chunk].tolist(),
            rail_in=self.rows[rail, chunk, grid.node].tolist(),
            node_out=[int(forwards[rail, r].sum()) for r in node],
            node_in=[int(forwards[sources[j], me].sum()) for j in range(grid.node_size)],
            pairs_out=[int(pairs[rail, r].sum()) for r in node],
            pairs_in=[int(pairs[sources[j], me].sum()) for j in range(grid.node_size)],
            origins=forwards[:, me].tolist(),
        )


@dataclass(frozen=True)
class Splits:
    """Rows of one chunk, by peer: on the rail (nodes) and in the node (indices); `pairs_…` of the same hop.

    origins: rows that this rank receives in the end, by source.
    """

    rail_out: list[int]
    rail_in: list[int]
    node_out: list[int]
    node_in: list[int]
    pairs_out: list[int]
    pairs_in: list[int]
    origins: list[int]


@dataclass(frozen=True)
class Sent:
    """A source's rows.

    Attributes:
        token: [rows] int64, chunk by chunk.
        weight: [rows, K] int64, index into the flattened probs [T·E] of the row's experts, in order.
        counts: [rows, K] bool, whether there is such an expert (K is the most a row can have).
        bits: [rows, B] uint8, the row's experts of the node, a bit each.
    """

    token: Tensor
    weight: Tensor
    counts: Tensor
    bits: Tensor


def sent(routing_map_TE: Tensor, grid: Grid, counts: Counts, most: int) -> Sent:
    """What this rank sends; `most` (K): experts of a row at most."""
    num_tokens = len(routing_map_TE)
    at_node = routing_map_TE.unflatten(1, (grid.num_nodes, grid.per_node))
    me = grid.node * grid.node_size + grid.index
    tokens, nodes = [], []
    for chunk, (lo, hi) in enumerate(chunk_bounds(num_tokens, grid.num_chunks)):
        held = at_node[lo:hi].any(2).t()
        number = int(counts.rows[me, chunk].sum())
        flat = _true(held.flatten(), number)
        tokens.append(flat % max(1, hi - lo) + lo)
        nodes.append(flat // max(1, hi - lo))
    token, node = torch.cat(tokens), torch.cat(nodes)
    mask = at_node[token, node]
    order, valid = first_true(mask, most)
    weight = (token * grid.num_experts + node * grid.per_node).unsqueeze(1) + order
    return Sent(token, weight, valid, pack_bits(mask))


@dataclass(frozen=True)
class Forwarded:
    """A gateway's part of a chunk.

    Attributes:
        row, rank: [forwards] int64, which of the rows that came goes on, and to which rank of the node; by rank.
        bits: [forwards, B] uint8, its experts at that rank.
        mask: [rows, E/N] bool, the rows' experts of this node.
        order, row_of_pair: [pairs] int64: pairs that come back, in the order in which they are added, and their rows.
        slot_of_pair: [pairs] int64, the slot of the node that each comes from; both for pairs as they come.
    """

    row: Tensor
    rank: Tensor
    bits: Tensor
    mask: Tensor
    order: Tensor
    row_of_pair: Tensor
    slot_of_pair: Tensor

    def sums(self, pairs: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, h]: pairs as they come [pairs, h], added up in the order of their experts."""
        total = torch.zeros(len(self.mask), pairs.shape[1], dtype=dtype, device=pairs.device)
        return add_rows(total, self.row_of_pair[self.order], pairs[self.order].to(dtype))


def forwarded(bits: Tensor, splits: Splits, grid: Grid, expert_of_slot: Tensor | None = None) -> Forwarded:
    """From the bits [rows, B] that came with a chunk's rows; `expert_of_slot`: [E], where experts are not at home."""
    mask = unpack_bits(bits, grid.per_node)
    at_rank = mask.unflatten(1, (grid.node_size, grid.per_rank))
    flat = _true(at_rank.any(2).t().flatten(), sum(splits.node_out))
    row, rank = flat % max(1, len(mask)), flat // max(1, len(mask))
    here = at_rank[row, rank]
    pair = _true(here.flatten(), sum(splits.pairs_out))
    of_forward, local = pair // grid.per_rank, pair % grid.per_rank
    slot = rank[of_forward] * grid.per_rank + local
    number = slot
    if expert_of_slot is not None:
        number = expert_of_slot[grid.node * grid.per_node + slot]
    order = number.sort(stable=True).indices
    return Forwarded(row, rank, pack_bits(here), mask, order, row[of_forward], slot)


@dataclass(frozen=True)
class Received:
    """A receiver's part of a chunk.

    Attributes:
        row: [pairs] int64, the row of each pair.
        expert: [pairs] int64, its local expert.
        source: [pairs] int64, the rank that the token is from.
    """

    row: Tensor
    expert: Tensor
    source: Tensor


def received(bits: Tensor, splits: Splits, grid: Grid) -> Received:
    """From the bits [rows, B] that came with a chunk's rows."""
    mask = unpack_bits(bits, grid.per_rank)
    pair = _true(mask.flatten(), sum(splits.pairs_in))
    row, expert = pair // grid.per_rank, pair % grid.per_rank
    # Rows come gateway by gateway, each gateway's source by source.
    origins = torch.tensor(splits.origins).view(grid.num_nodes, grid.node_size).t().flatten()
    sources = torch.arange(grid.num_ranks).view(grid.num_nodes, grid.node_size).t().flatten()
    of_row = sources.repeat_interleave(origins).to(row.device)
    return Received(row, expert, of_row[row])


def expert_order(expert: Tensor, source: Tensor, num_sources: int) -> Tensor:
    """The order that puts pairs expert by expert, and an expert's by the rank of their tokens, then by token.

    It is the order of Megatron's all-to-all dispatcher, so that an expert sees the same batch.
    """
    return (expert * num_sources + source).sort(stable=True).indices


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total[index[k]] += rows[k], one k after the other on every device: sums have one order."""
    if total.is_cuda:
        return total.index_put_((index,), rows, accumulate=True)  # sorts, then adds in order
    return total.index_add_(0, index, rows)


def pack_bits(mask: Tensor) -> Tensor:
    """[n, E] bool → [n, ⌈E/8⌉] uint8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(1, (padded.shape[1] // 8, 8)) * powers).sum(2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, number: int) -> Tensor:
    """The inverse: [n, B] uint8 → [n, number] bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(2) >> shifts) & 1).bool().flatten(1)[:, :number]


def _true(flags: Tensor, number: int) -> Tensor:
    """Where a flat mask is true, in order; `number` of them, so that no GPU is asked how many."""
    if flags.is_cuda:
        return flags.to(torch.uint8).argsort(descending=True, stable=True)[:number]
    found = flags.nonzero()[:, 0]
    assert len(found) == number, (len(found), number)
    return found


def first_true(mask: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Columns of each row's first `number` true entries [n, number], and whether there are so many."""
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :number]
    return order, mask.gather(1, order)
