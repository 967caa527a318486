"""EPLB: redundant experts from load statistics (report §3.4.1; the algorithm that deepseek-ai/EPLB publishes).

A *logical* expert is one of the model's; a *physical* one is a slot on a GPU that holds a copy of it. Where the expert
groups can be dealt out to the nodes evenly the policy is hierarchical, so that node-limited routing still finds a
token's groups on few nodes:

    1. pack the expert groups into nodes, the same number into each
    2. inside each node, give every free slot to the expert whose copies have most to do
    3. inside each node, pack the copies into GPUs, the same number into each

Otherwise it is global: steps 2 and 3 over all GPUs at once. Packing takes the heaviest item first and gives it to the
lightest pack that has room. Ties go to the lower index everywhere. Sums are fp32, as published.

Shape suffixes: L layers, E logical experts, R replicas (physical experts), B rows to pack, N items of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pack", "rebalance_experts", "replicate"]


def rebalance_experts(
    weight: Tensor | Sequence[Sequence[float]],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts that each slot holds, for every layer.

    Exactly the published algorithm, which is greedy: "never worse than the same copies in the experts' order" is not
    true of it. Of 30,000 random cases on nodes of 8 GPUs 5 were worse, by at most 2%; of 30,000 on 1 to 16 GPUs, with
    few experts on each, 366 were, by at most 13% (tests/balance/test_eplb.py). Training's placement
    (`placement.balanced`) refines its packing and is never worse than what it starts from.

    Args:
        weight: [L, E], load of each logical expert in any unit, finite and not negative; a tensor or lists.
        num_replicas: R, slots of all GPUs together, a multiple of `num_gpus` and at least E.
        num_groups: groups of the router's group-limited selection.
        num_nodes: machines; the policy is hierarchical where it divides `num_groups`, else global.
        num_gpus: GPUs of all nodes together; GPU g holds the slots g·R/num_gpus and following.

    Returns:
        phy2log [L, R]: the logical expert of each slot.
        log2phy [L, E, largest number of copies]: the slots of each expert, first copy first, padded with −1.
        logcnt [L, E]: the number of copies of each expert.
        All int64, on the CPU.

    Raises:
        ValueError: the numbers do not divide, or `weight` is no table of loads: negative, not finite, of another shape.
    """
    weight_LE = _checked(weight, num_replicas, num_gpus)
    num_experts = weight_LE.shape[1]
    if num_groups < 1 or num_nodes < 1:
        raise ValueError(f"{num_groups=}, {num_nodes=}: both must be at least 1")
    if num_groups % num_nodes:  # the global policy: one group, one node
        num_groups = num_nodes = 1
    if num_experts % num_groups:
        raise ValueError(f"{num_experts} experts: not a multiple of {num_groups=}")
    if num_gpus % num_nodes:
        raise ValueError(f"{num_gpus=} is not a multiple of {num_nodes=}")

    phy2log_LR, copy_LR, logcnt_LE = _hierarchical(weight_LE, num_replicas, num_groups, num_nodes, num_gpus)

    num_layers, most = len(weight_LE), int(logcnt_LE.max())
    log2phy_LEC = torch.full((num_layers, num_experts, most), -1, dtype=torch.int64)
    slots_LR = torch.arange(num_replicas).expand(num_layers, -1)
    log2phy_LEC.view(num_layers, -1).scatter_(1, phy2log_LR * most + copy_LR, slots_LR)
    return phy2log_LR, log2phy_LEC, logcnt_LE


def pack(weight_BN: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Pack the N items of each row into packs of N/num_packs items: heaviest first, each to the lightest with room.

    Returns:
        pack_BN and place_BN, int64: the pack of each item, and its place there (0 is the first to arrive).
    """
    num_rows, num_items = weight_BN.shape
    if num_items % num_packs:
        raise ValueError(f"{num_items} items do not fill {num_packs} packs evenly")
    room = num_items // num_packs
    if room == 1:  # each item is a pack; as published, in their own order
        return torch.arange(num_items).expand(num_rows, -1).clone(), torch.zeros_like(
            weight_BN, dtype=torch.int64
        )
    order_BN = weight_BN.sort(dim=1, descending=True, stable=True).indices
    pack_BN, place_BN = torch.empty_like(order_BN), torch.empty_like(order_BN)
    load = weight_BN.new_zeros(num_rows, num_packs)  # infinite where a pack is full, and nowhere else
    filled = torch.zeros(num_rows, num_packs, dtype=torch.int64)
    largest = torch.finfo(load.dtype).max
    for item in order_BN.split(1, dim=1):
        lightest = load.argmin(dim=1, keepdim=True)
        place = filled.gather(1, lightest)
        pack_BN.scatter_(1, item, lightest)
        place_BN.scatter_(1, item, place)
        after = (load.gather(1, lightest) + weight_BN.gather(1, item)).clamp(max=largest)
        load.scatter_(1, lightest, after.masked_fill(place + 1 == room, torch.inf))
        filled.scatter_(1, lightest, place + 1)
    return pack_BN, place_BN


def replicate(weight_BN: Tensor, num_replicas: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give the slots beyond one per item to the item with the most load per copy, one after the other.

    Returns:
        item_BR: the item of each slot; the first N slots are the items themselves.
        copy_BR: which copy of its item a slot is, from 0.
        count_BN: copies of each item. All int64.
    """
    num_rows, num_items = weight_BN.shape
    item_BR = torch.arange(num_replicas).expand(num_rows, -1).clone()
    copy_BR = torch.zeros_like(item_BR)
    count_BN = torch.ones(num_rows, num_items, dtype=torch.int64)
    for slot in range(num_items, num_replicas):
        busiest = (weight_BN / count_BN).argmax(dim=1, keepdim=True)
        count = count_BN.gather(1, busiest)
        item_BR[:, slot : slot + 1] = busiest
        copy_BR[:, slot : slot + 1] = count
        count_BN.scatter_(1, busiest, count + 1)
    return item_BR, copy_BR, count_BN


def _hierarchical(
    weight_LE: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """phy2log [L, R], the copy number of each slot [L, R], logcnt [L, E]."""
    num_layers, num_experts = weight_LE.shape
    group_size, node_experts = num_experts // num_groups, num_experts // num_nodes
    node_slots, node_gpus = num_replicas // num_nodes, num_gpus // num_nodes

    # 1. Groups to nodes. "Dealt" experts stand in the order of the nodes: those of node n from n·E/num_nodes on.
    node_LG, place_LG = pack(weight_LE.unflatten(1, (num_groups, group_size)).sum(2), num_nodes)
    dealt_LG = node_LG * (num_groups // num_nodes) + place_LG
    log2dealt_LE = (dealt_LG.unsqueeze(2) * group_size + torch.arange(group_size)).flatten(1)
    dealt2log_LE = _inverse(log2dealt_LE)

    # 2. Copies inside each node; a row per layer and node from here on.
    weight_BN = weight_LE.gather(1, dealt2log_LE).view(-1, node_experts)
    item_BR, copy_BR, count_BN = replicate(weight_BN, node_slots)

    # 3. Copies to the GPUs of the node.
    gpu_BR, place_BR = pack((weight_BN / count_BN).gather(1, item_BR), node_gpus)
    packed_BR = _inverse(gpu_BR * (node_slots // node_gpus) + place_BR)
    first_of_node = torch.arange(num_nodes).view(1, -1, 1) * node_experts
    dealt_LR = (item_BR.gather(1, packed_BR).view(num_layers, num_nodes, -1) + first_of_node).flatten(1)
    return (
        dealt2log_LE.gather(1, dealt_LR),
        copy_BR.gather(1, packed_BR).view(num_layers, -1),
        count_BN.view(num_layers, -1).gather(1, log2dealt_LE),
    )


def _inverse(permutation_BN: Tensor) -> Tensor:
    places = torch.arange(permutation_BN.shape[1]).expand_as(permutation_BN)
    return torch.empty_like(permutation_BN).scatter_(1, permutation_BN, places)


def _checked(weight: Tensor | Sequence[Sequence[float]], num_replicas: int, num_gpus: int) -> Tensor:
    """The weights as fp32 on the CPU."""
    try:
        given = torch.as_tensor(weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"weight is no table of numbers ({error}): give [layers, experts]") from error
    if given.is_complex():
        raise ValueError(f"weight is {given.dtype}: a load is a count of tokens")
    weight_LE = given.detach().cpu().float()
    if weight_LE.dim() != 2 or weight_LE.numel() == 0:
        raise ValueError(f"weight has the shape {list(weight_LE.shape)}: give [layers, experts]")
    if not bool((torch.isfinite(weight_LE) & (weight_LE >= 0)).all()):
        raise ValueError("weight has an entry that is negative or not finite: a load is a count of tokens")
    if num_gpus < 1 or num_replicas % num_gpus:
        raise ValueError(f"{num_replicas=} is not a multiple of {num_gpus=}: every GPU holds the same number")
    if num_replicas < weight_LE.shape[1]:
        raise ValueError(f"{num_replicas=} is fewer than the {weight_LE.shape[1]} experts: each needs a slot")
    return weight_LE
