"""Training's placement: near the best there is (found by trying all), inside its limits, and with few moves."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from dsv3_megatron.balance.placement import Machine, balanced, home, rank_load
from tests.balance.test_eplb import random_load


def best_of_all(load: list[float], ranks: int, experts: list[int]) -> float:
    """The smallest possible load of the fullest rank, by trying every way to deal `experts` out to `ranks` ranks."""
    room = len(experts) // ranks
    if ranks == 1:
        return sum(load[e] for e in experts)
    first, *others = experts
    found = float("inf")
    for rest in itertools.combinations(others, room - 1):
        here = load[first] + sum(load[e] for e in rest)
        if here < found:
            left = [e for e in others if e not in rest]
            found = min(found, max(here, best_of_all(load, ranks - 1, left)))
    return found


def best_placement(load: list[float], machine: Machine) -> float:
    """The same under the limits: groups whole, dealt out to nodes, or experts inside their block of ranks."""
    everything = list(range(len(load)))
    if not machine.groups_move:
        size = len(load) // machine.num_blocks
        blocks = [everything[i : i + size] for i in range(0, len(load), size)]
        return max(best_of_all(load, machine.num_ranks // machine.num_blocks, block) for block in blocks)
    size, room = len(load) // machine.num_groups, machine.num_groups // machine.num_nodes
    found = float("inf")
    for order in itertools.permutations(range(machine.num_groups)):
        nodes = [order[i : i + room] for i in range(0, len(order), room)]
        if nodes == sorted(tuple(sorted(node)) for node in nodes):  # each way once
            experts = [[g * size + i for g in node for i in range(size)] for node in nodes]
            per_node = machine.num_ranks // machine.num_nodes
            found = min(found, max(best_of_all(load, per_node, node) for node in experts))
    return found


MACHINES = [
    (8, Machine(4)),
    (8, Machine(2)),
    (12, Machine(4)),
    (8, Machine(4, 2, 4)),
    (16, Machine(4, 2, 4)),
    (16, Machine(4, 2, 2)),
    (16, Machine(4, 2, 4, across_nodes=False)),
    (8, Machine(4, 4, 2)),
]


@pytest.mark.parametrize(("experts", "machine"), MACHINES)
def test_within_five_percent_of_the_best(experts, machine):
    torch.manual_seed(3)
    for case in range(30):
        load = random_load(case % 3, 1, experts) + 0.01
        slots = balanced(load, home(1, experts), machine)
        found = rank_load(load.double(), slots, machine.num_ranks).max().item()
        assert found <= 1.05 * best_placement(load[0].double().tolist(), machine)


@pytest.mark.parametrize(
    "machine", [Machine(64, 8, 8), Machine(32, 4, 8), Machine(8, 1, 8), Machine(16, 16, 8)]
)
def test_limits_and_gain_on_a_large_model(machine):
    torch.manual_seed(4)
    load = random_load(2, 3, 256) ** 0.5
    slots = balanced(load, home(3, 256), machine)
    assert torch.equal(slots.sort(1).values, home(3, 256))
    before, after = (rank_load(load, s, machine.num_ranks).amax(1) for s in (home(3, 256), slots))
    assert bool((after < before).all())
    node = torch.empty_like(slots).scatter_(1, slots, home(3, 256)) // (256 // machine.num_nodes)
    spread = max(1, machine.num_nodes // machine.num_groups)  # nodes of a group
    for experts in node.unflatten(1, (machine.num_groups, -1)).flatten(0, 1):
        assert len(set(experts.tolist())) <= spread
    # Each block of ranks against a bound that no packing can pass.
    blocks = rank_load(load, slots, machine.num_ranks).view(3 * machine.num_blocks, -1)
    in_block = load.gather(1, slots).view(3 * machine.num_blocks, -1)
    room = 256 // machine.num_ranks
    lightest = in_block.sort(1).values[:, : room - 1].sum(1)
    bound = torch.maximum(blocks.mean(1), in_block.amax(1) + lightest)
    assert bool((blocks.amax(1) <= 1.05 * bound).all()) or machine.groups_move


def moved(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum())


def test_what_can_stay_stays():
    torch.manual_seed(5)
    draw = random.Random(5)
    for experts, machine in MACHINES:
        load = random_load(2, 4, experts)
        slots = balanced(load, home(4, experts), machine)
        assert moved(balanced(load, slots, machine), slots) == 0  # balanced already
        # An expert that stays on its rank stays in its slot, so that it need not be copied.
        rank_of = torch.arange(experts) // (experts // machine.num_ranks)
        for layer in range(4):
            for slot in range(experts):
                where = (slots[layer] == slot).nonzero().item()
                assert where == slot or rank_of[where] != rank_of[slot]
        # Ranks as such have no names: balanced experts on exchanged ranks are left alone.
        order = list(range(machine.num_ranks // machine.num_blocks))
        draw.shuffle(order)
        blocks = slots.view(4, machine.num_blocks, len(order), -1)
        exchanged = blocks[:, :, order].reshape(4, -1)
        assert moved(balanced(load, exchanged, machine), exchanged) == 0


def test_even_load_moves_nothing():
    load = torch.full((2, 64), 100.0)
    for machine in (Machine(8, 2, 4), Machine(64, 8, 8)):
        assert torch.equal(balanced(load, home(2, 64), machine), home(2, 64))
    assert torch.equal(balanced(load * 0, home(2, 64), Machine(8)), home(2, 64))


def test_the_fullest_rank_never_gets_fuller():
    torch.manual_seed(6)
    for _ in range(40):
        before = torch.stack([torch.randperm(16) for _ in range(4)])
        load = random_load(2, 4, 16)
        after = balanced(load, before, Machine(4))
        assert bool((rank_load(load, after, 4).amax(1) <= rank_load(load, before, 4).amax(1)).all())


def test_wrong_machines():
    with pytest.raises(ValueError, match="6 ranks do not lie evenly on 4 nodes"):
        Machine(6, 4)
    scattered = torch.tensor([[0, 2, 4, 6, 1, 3, 5, 7]])
    with pytest.raises(ValueError, match="several nodes"):
        balanced(torch.rand(1, 8), scattered, Machine(4, 2, 4))
