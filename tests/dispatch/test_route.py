"""Index arithmetic of the two hops, all ranks in one process: every token reaches its experts once, in one order."""

import random

import pytest
import torch
from torch import Tensor

from dsv3_megatron.dispatch.links import node_blocks
from dsv3_megatron.dispatch.route import (
    Counts,
    Grid,
    expert_order,
    forwarded,
    pack_bits,
    received,
    sent,
    unpack_bits,
)

GRIDS = [(2, 2, 8, 1), (2, 4, 16, 3), (4, 2, 8, 2), (1, 4, 8, 2), (4, 1, 12, 3), (3, 2, 18, 5)]


def routing(draw: random.Random, tokens: int, experts: int, topk: int) -> Tensor:
    mask = torch.zeros(tokens, experts, dtype=torch.bool)
    for row in mask:
        row[draw.sample(range(experts), topk)] = True
    return mask


def pairs_by_hand(maps: list[Tensor], rank: int, per_rank: int) -> list[tuple[int, int, int]]:
    """(expert, source, token) of everything that rank's experts get, in the order of Megatron's all-to-all."""
    return [
        (expert, source, token)
        for expert in range(rank * per_rank, (rank + 1) * per_rank)
        for source, mask in enumerate(maps)
        for token in mask[:, expert].nonzero()[:, 0].tolist()
    ]


@pytest.mark.parametrize(("nodes", "size", "experts", "chunks"), GRIDS)
def test_every_pair_arrives_once_in_the_order_of_alltoall(nodes, size, experts, chunks):
    draw = random.Random(nodes * 10 + size)
    ranks = nodes * size
    maps = [routing(draw, draw.choice([0, 1, 2, 7, 12]), experts, 3) for _ in range(ranks)]
    grids = [Grid(nodes, size, *divmod(r, size), experts, chunks) for r in range(ranks)]
    lines = torch.stack([Counts.own(mask, grid) for mask, grid in zip(maps, grids, strict=True)])
    counts = Counts.of(lines, grids[0])
    outs = [sent(mask, grid, counts, 3) for mask, grid in zip(maps, grids, strict=True)]
    arrived: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    back: list[list[int]] = [[0] * len(out.token) for out in outs]  # pairs that come back to each row
    starts = [0] * ranks
    for chunk in range(chunks):
        hops = [counts.hops(grid, chunk) for grid in grids]
        rail: dict[int, list[tuple[int, int]]] = {r: [] for r in range(ranks)}  # gateway → (source, row)
        for source in range(ranks):
            row = starts[source]
            for node, number in enumerate(hops[source].rail_out):
                rail[node * size + source % size] += [(source, row + k) for k in range(number)]
                row += number
            starts[source] = row
        forwards: dict[int, list[tuple[int, int]]] = {r: [] for r in range(ranks)}
        bits: dict[int, list[Tensor]] = {r: [] for r in range(ranks)}
        for gateway in range(ranks):
            came = sorted(rail[gateway], key=lambda entry: entry[0])  # by source, as on the wire
            assert [sum(s == g for s, _ in came) for g in range(gateway % size, ranks, size)] == hops[
                gateway
            ].rail_in
            rows = torch.stack([outs[s].bits[k] for s, k in came]) if came else outs[0].bits[:0]
            gate = forwarded(rows, hops[gateway], grids[gateway])
            at = 0
            for index, number in enumerate(hops[gateway].node_out):
                target = grids[gateway].node * size + index
                forwards[target] += [came[k] for k in gate.row[at : at + number].tolist()]
                bits[target].append(gate.bits[at : at + number])
                at += number
            # On the way back the pairs of a row are added up in the order of the experts' numbers.
            slots = gate.slot_of_pair[gate.order]
            assert slots.tolist() == sorted(gate.slot_of_pair.tolist())
            for k in gate.row_of_pair.tolist():
                back[came[k][0]][came[k][1]] += 1
        for rank in range(ranks):
            receipt = received(torch.cat(bits[rank]), hops[rank], grids[rank])
            first = rank * grids[rank].per_rank
            columns = (receipt.row.tolist(), receipt.expert.tolist(), receipt.source.tolist())
            for row, expert, source in zip(*columns, strict=True):
                origin, index = forwards[rank][row]
                assert origin == source
                arrived[rank].append((first + expert, source, int(outs[source].token[index])))
    for rank in range(ranks):
        if arrived[rank]:
            expert, source, _ = (torch.tensor(column) for column in zip(*arrived[rank], strict=True))
            order = expert_order(expert, source, ranks).tolist()
            arrived[rank] = [arrived[rank][k] for k in order]
        assert arrived[rank] == pairs_by_hand(maps, rank, experts // ranks)
    assert sum(map(sum, back)) == sum(map(len, arrived)) == sum(int(mask.sum()) for mask in maps)
    for mask, out, grid, number in zip(maps, outs, grids, back, strict=True):
        at_node = mask.unflatten(1, (nodes, experts // nodes))
        assert len(out.token) == at_node.any(2).sum()  # each token once per node
        assert number == unpack_bits(out.bits, grid.per_node).sum(1).tolist() == out.counts.sum(1).tolist()
        chosen = torch.zeros_like(mask).flatten()
        chosen[out.weight[out.counts]] = True
        assert torch.equal(chosen.view_as(mask), mask)


def test_experts_that_are_not_at_home_are_added_up_in_the_order_of_their_numbers():
    grid = Grid(1, 4, 0, 0, 8)
    experts = torch.tensor([6, 1, 0, 7, 4, 2, 5, 3])
    mask = torch.ones(3, 8, dtype=torch.bool)
    lines = torch.stack([Counts.own(mask if rank == 0 else mask[:0], grid) for rank in range(4)])
    counts = Counts.of(lines, grid)
    gate = forwarded(pack_bits(mask), counts.hops(grid, 0), grid, experts)
    numbers = experts[gate.slot_of_pair[gate.order]]
    for row in range(3):
        assert numbers[gate.row_of_pair[gate.order] == row].tolist() == list(range(8))


@pytest.mark.parametrize("number", [1, 7, 8, 9, 32])
def test_bits(number):
    mask = torch.rand(5, number) < 0.5
    bits = pack_bits(mask)
    assert bits.shape == (5, -(-number // 8)) and bits.dtype == torch.uint8
    assert torch.equal(unpack_bits(bits, number), mask)
    assert unpack_bits(bits[:0], number).shape == (0, number)


def test_nodes_of_a_group():
    assert node_blocks([0, 1, 2, 3], 2) == [[0, 1], [2, 3]]
    assert node_blocks([0, 2, 4, 6], 4) == [[0, 2], [4, 6]]  # expert tensor parallel ranks lie between
    assert node_blocks([4, 5], 8) == [[4, 5]]
    with pytest.raises(ValueError, match=r"--moe-node-size 4: .* do not lie evenly"):
        node_blocks([2, 3, 4, 5, 6, 7], 4)
