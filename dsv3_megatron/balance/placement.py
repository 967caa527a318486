"""Which rank holds which expert in training: no copies, as many on every rank, the fullest rank as light as can be.

The published packing (`eplb.pack`) starts, exchanges of two experts between the fullest rank and another go on until
none helps, and ranks then keep what they already have wherever the result allows it, because each move costs.

The router's groups stay together: a token may be sent to few nodes only (report §2.1.2), and must not be sent to more
because experts have moved. Shape suffixes: L layers, E experts, B rows to pack, N items of a row, P packs.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_megatron.balance.eplb import pack

__all__ = ["Machine", "balanced", "home", "rank_load"]

_ENOUGH = 0.01  # a placement within 1% of what was found is left as it is
_STARTS = 16  # packings that are tried
_WAYS = 128  # ways to deal groups out to nodes that are tried


@dataclass(frozen=True)
class Machine:
    """What experts are placed on.

    Attributes:
        num_ranks: ranks of an expert-parallel group; rank r holds the slots r·E/num_ranks and following.
        num_nodes: nodes they lie on, the same number of ranks on each, in order.
        num_groups: groups of the router's selection.
        across_nodes: whether a whole expert group may go to another node. Where sums are made node by node (two-hop
            dispatch) it may not: the order of the sum would change.
    """

    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    across_nodes: bool = True

    def __post_init__(self) -> None:
        if min(self.num_ranks, self.num_nodes, self.num_groups) < 1 or self.num_ranks % self.num_nodes:
            raise ValueError(f"{self.num_ranks} ranks do not lie evenly on {self.num_nodes} nodes")

    @property
    def groups_move(self) -> bool:
        """Whether expert groups are dealt out to the nodes anew; one group per node would only change its node."""
        several = self.num_groups > self.num_nodes and self.num_groups % self.num_nodes == 0
        return self.across_nodes and self.num_nodes > 1 and several

    @property
    def num_blocks(self) -> int:
        """Stretches of ranks inside which single experts move.

        Nodes; or the nodes of one expert group together, where a group is larger than a node.
        """
        larger = self.across_nodes and self.num_nodes % self.num_groups == 0
        return self.num_groups if larger else self.num_nodes


def home(num_layers: int, num_experts: int) -> Tensor:
    """[L, E] int64, the placement that Megatron begins with: slot i holds expert i."""
    return torch.arange(num_experts).expand(num_layers, -1).clone()


def rank_load(load_LE: Tensor, slots_LE: Tensor, num_ranks: int) -> Tensor:
    """[L, ranks], the load of each rank; `slots_LE`: the expert of each slot."""
    return load_LE.gather(1, slots_LE).unflatten(1, (num_ranks, -1)).sum(2)


def balanced(load_LE: Tensor, slots_LE: Tensor, machine: Machine) -> Tensor:
    """A better placement for this load, layer by layer; a layer that is near its best already keeps its own.

    Args:
        load_LE: [L, E], tokens of each expert.
        slots_LE: [L, E] int64, the expert that each slot holds now.

    Returns:
        [L, E] int64, the expert that each slot is to hold. In every layer a permutation.
    """
    load_LE = load_LE.double()
    packs = machine.num_ranks // machine.num_blocks
    if machine.groups_move:
        node_LE = _deal_groups(load_LE, slots_LE, machine)
    else:
        node_LE = slots_LE
    items_BN = node_LE.reshape(-1, slots_LE.shape[1] // machine.num_blocks)
    pack_BN, _ = _lightest(load_LE.gather(1, node_LE).view_as(items_BN), packs, _STARTS)
    found_LE = _keep_places(items_BN, pack_BN, slots_LE.view_as(items_BN), packs).view_as(slots_LE)
    before = rank_load(load_LE, slots_LE, machine.num_ranks).amax(1)
    after = rank_load(load_LE, found_LE, machine.num_ranks).amax(1)
    return torch.where((after < before * (1 - _ENOUGH)).unsqueeze(1), found_LE, slots_LE)


def _lightest(weight_BN: Tensor, num_packs: int, num_starts: int) -> tuple[Tensor, Tensor]:
    """The best of several packings [B, N], and the load of its heaviest pack [B]."""
    starts = torch.stack([pack(guess, num_packs)[0] for guess in _guesses(weight_BN, num_starts)])
    many = weight_BN.repeat(len(starts), 1)
    refined = refine(many, starts.flatten(0, 1), num_packs)
    loads = torch.zeros(len(many), num_packs, dtype=many.dtype).scatter_add_(1, refined, many)
    heaviest, best = loads.amax(1).view(len(starts), -1).min(0)
    return refined.view_as(starts)[best, torch.arange(len(weight_BN))], heaviest


def _guesses(weight_BN: Tensor, number: int) -> Tensor:
    """The weights, and again with noise of growing size: from each the greedy packing starts elsewhere."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(number, *weight_BN.shape, dtype=weight_BN.dtype, generator=generator)
    return weight_BN * (noise * torch.linspace(0, 1, number, dtype=weight_BN.dtype).view(-1, 1, 1)).exp()


def refine(weight_BN: Tensor, pack_BN: Tensor, num_packs: int) -> Tensor:
    """Exchange items between the fullest pack and another as long as the fuller of the two gets lighter.

    Returns the pack of each item, [B, N].
    """
    pack_BN = pack_BN.clone()
    num_rows, num_items = weight_BN.shape
    room = num_items // num_packs
    load_BP = torch.zeros(num_rows, num_packs, dtype=weight_BN.dtype).scatter_add_(1, pack_BN, weight_BN)
    rows = torch.arange(num_rows)
    while len(rows):
        weight, packs, load = weight_BN[rows], pack_BN[rows], load_BP[rows]
        fullest = load.argmax(1, keepdim=True)
        inside = (packs == fullest).nonzero()[:, 1].view(-1, room)
        # [rows, items of the fullest pack, all items]: what the two packs would hold after the exchange
        gain = weight.gather(1, inside).unsqueeze(2) - weight.unsqueeze(1)
        mine = load.gather(1, fullest).unsqueeze(2) - gain
        theirs = load.gather(1, packs).unsqueeze(1) + gain
        fuller = torch.maximum(mine, theirs).masked_fill((packs == fullest).unsqueeze(1), torch.inf)
        best, at = fuller.flatten(1).min(1)
        helps = best < load.amax(1) * (1 - 1e-9)
        rows, at, inside, fullest = rows[helps], at[helps], inside[helps], fullest[helps, 0]
        if not len(rows):
            break
        item = inside.gather(1, (at // num_items).unsqueeze(1))[:, 0]
        other = at % num_items
        theirs_pack = pack_BN[rows, other]
        moved = weight_BN[rows, item] - weight_BN[rows, other]
        pack_BN[rows, item], pack_BN[rows, other] = theirs_pack, fullest
        load_BP[rows, fullest] -= moved
        load_BP[rows, theirs_pack] += moved
    return pack_BN


def _deal_groups(load_LE: Tensor, slots_LE: Tensor, machine: Machine) -> Tensor:
    """The experts in the order of the nodes [L, E], whole groups dealt out to them so that they can be packed best."""
    num_layers, num_experts = load_LE.shape
    nodes, size = machine.num_nodes, num_experts // machine.num_groups
    of_group = (slots_LE.view(num_layers, nodes, -1) // size).sort(2).values
    held = of_group[:, :, ::size]  # the groups of each node
    if not torch.equal(of_group, held.repeat_interleave(size, 2)):
        raise ValueError("the experts of a group lie on several nodes")
    groups = torch.arange(machine.num_groups).expand(num_layers, -1)
    ways = _ways(load_LE.unflatten(1, (-1, size)).sum(2), nodes)
    # Each way is tried with one packing of its nodes.
    dealt_ALG = ways.sort(dim=2, stable=True).indices
    dealt_ALE = (dealt_ALG.unsqueeze(3) * size + torch.arange(size)).flatten(2)
    in_nodes = load_LE.expand_as(dealt_ALE).gather(2, dealt_ALE).reshape(-1, num_experts // nodes)
    _, heaviest = _lightest(in_nodes, machine.num_ranks // nodes, 1)
    best_L = heaviest.view(len(ways), num_layers, nodes).amax(2).argmin(0)
    dealt_LG = _keep_places(groups, ways[best_L, torch.arange(num_layers)], held.flatten(1), nodes)
    return (dealt_LG.unsqueeze(2) * size + torch.arange(size)).flatten(1)


def _ways(group_load_LG: Tensor, num_nodes: int) -> Tensor:
    """The node of each group in different ways [A, L, G]: all of them where they are few, else good guesses."""
    num_layers, num_groups = group_load_LG.shape
    room = num_groups // num_nodes
    count = math.factorial(num_groups) // (math.factorial(room) ** num_nodes * math.factorial(num_nodes))
    if count > _WAYS:
        return torch.stack([pack(guess, num_nodes)[0] for guess in _guesses(group_load_LG, _WAYS)])
    every = torch.tensor(list(_partitions([-1] * num_groups, 0, room)))
    return every.unsqueeze(1).expand(-1, num_layers, -1)


def _partitions(node: list[int], number: int, room: int) -> Iterator[list[int]]:
    """All ways to fill nodes `number` and following with the groups that have none, the first of them first."""
    free = [group for group, taken in enumerate(node) if taken < 0]
    if not free:
        yield node
        return
    for others in itertools.combinations(free[1:], room - 1):
        chosen = (free[0], *others)
        yield from _partitions([number if g in chosen else n for g, n in enumerate(node)], number + 1, room)


def _keep_places(items_BN: Tensor, pack_BN: Tensor, now_BN: Tensor, num_packs: int) -> Tensor:
    """Put packs where most of their items already are, and items where they already are.

    Args:
        items_BN: item of each column; pack_BN: the pack it is to be in.
        now_BN: the item that each place holds now; pack p's places are p·N/num_packs and following.

    Returns:
        [B, N], the item that each place is to hold.
    """
    result = torch.empty_like(now_BN)
    room = now_BN.shape[1] // num_packs
    for row, (items, packs, now) in enumerate(
        zip(items_BN.tolist(), pack_BN.tolist(), now_BN.tolist(), strict=True)
    ):
        members: list[list[int]] = [[] for _ in range(num_packs)]
        for item, number in zip(items, packs, strict=True):
            members[number].append(item)
        places = [now[p * room : (p + 1) * room] for p in range(num_packs)]
        pack_at = _match(members, places)
        result[row] = torch.tensor(
            [item for p, old in enumerate(places) for item in _keep_order(members[pack_at[p]], old)]
        )
    return result


def _match(members: list[list[int]], places: list[list[int]]) -> list[int]:
    """The pack of each stretch of places: the pair with most in common first, ties to the lower places, then pack."""
    where = {item: p for p, stretch in enumerate(places) for item in stretch}
    common: dict[tuple[int, int], int] = {}
    for number, items in enumerate(members):
        for item in items:
            if item in where:
                key = (where[item], number)
                common[key] = common.get(key, 0) + 1
    pack_at: dict[int, int] = {}
    taken: set[int] = set()
    for (p, number), _ in sorted(common.items(), key=lambda entry: (-entry[1], entry[0])):
        if p not in pack_at and number not in taken:
            pack_at[p] = number
            taken.add(number)
    left = iter(number for number in range(len(members)) if number not in taken)
    return [pack_at[p] if p in pack_at else next(left) for p in range(len(places))]


def _keep_order(items: list[int], old: list[int]) -> list[int]:
    """The items, each at its old place where it has one; the rest in ascending order."""
    arriving = iter(sorted(set(items) - set(old)))
    staying = set(items)
    return [item if item in staying else next(arriving) for item in old]
