"""Copies of experts that follow the measured load while the model serves (report §3.4).

Between two steps all ranks of an expert-parallel group add up what each expert had to do, ask
`balance.rebalance_experts` which copies there should be, send each other the weights of those that are new where they
are, and go on. No request notices: a copy has the weights of its expert, wherever it is.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.balance import rebalance_experts
from dsv3_megatron.specs.expert_slots import ExpertSlots

__all__ = ["Redundancy", "in_place", "sources"]


class Redundancy:
    """The MoE layers of this rank whose experts have copies.

    Args:
        model: this rank's part.
        num_nodes: machines under an expert-parallel group; where they divide the expert groups, groups stay on a node.

    Attributes:
        layers: by name, in one order on all ranks.
        changed: slots that got another expert, over all layers and calls of `rebalance`.
    """

    def __init__(self, model: torch.nn.Module, num_nodes: int = 1):
        self.layers = [
            module for module in model.modules() if isinstance(getattr(module, "slots", None), ExpertSlots)
        ]
        self.num_nodes = num_nodes
        self.changed = 0

    def rebalance(self) -> int:
        """Give the copies to the experts that have most to do; the number of slots that changed.

        All ranks of the expert-parallel group call it, between two forward passes. A layer without load stays as it is.
        """
        loads = self._loads()
        changed = 0
        for layer, load in zip(self.layers, loads, strict=True):
            layer.slots.clear()
            if not int(load.sum()):
                continue
            held = in_place(layer.slots.held, self._wanted(layer, load), layer.ep_group.size())
            changed += int((held != layer.slots.held).sum())
            _move(layer, held)
        self.changed += changed
        return changed

    def _loads(self) -> list[Tensor]:
        """[num_choices] of each layer over all ranks, on the CPU."""
        if not self.layers:
            return []
        device = torch.cuda.current_device()
        together = torch.stack([layer.slots.load.to(device) for layer in self.layers])
        dist.all_reduce(together, group=self.layers[0].ep_group)
        return list(together.cpu())

    def _wanted(self, layer: Any, load: Tensor) -> Tensor:
        groups, nodes = layer.config.moe_router_num_groups or 1, self.num_nodes
        if layer.slots.shared_as_routed or groups % nodes:  # the shared expert is of no group
            groups = nodes = 1
        held, _, _ = rebalance_experts(
            load.unsqueeze(0), layer.slots.num_experts, groups, nodes, layer.ep_group.size()
        )
        return held[0]


def in_place(held: Tensor, wanted: Tensor, num_ranks: int) -> Tensor:
    """`wanted` with each rank's slots in an order in which experts that stay on a rank stay in their slot.

    Args:
        held, wanted: [slots] int64, the expert of each slot now and then.
    """
    result = []
    for now, then in zip(held.view(num_ranks, -1).tolist(), wanted.view(num_ranks, -1).tolist(), strict=True):
        left = list(then)
        row: list[int | None] = []
        for expert in now:
            stays = expert in left
            row.append(expert if stays else None)
            if stays:
                left.remove(expert)
        result += [left.pop(0) if expert is None else expert for expert in row]
    return torch.tensor(result)


def sources(held: Tensor, wanted: Tensor, num_ranks: int) -> list[tuple[int, int]]:
    """(slot, slot that has its new expert now) for every slot that changes; of one's own rank where it can be.

    Copies elsewhere take turns, so that not all ranks ask the same one.
    """
    per_rank = len(held) // num_ranks
    where: dict[int, list[int]] = {}
    for slot, expert in enumerate(held.tolist()):
        where.setdefault(expert, []).append(slot)
    found = []
    for slot, (now, then) in enumerate(zip(held.tolist(), wanted.tolist(), strict=True)):
        if now == then:
            continue
        rank, copies = slot // per_rank, where[then]
        near = [copy for copy in copies if copy // per_rank == rank]
        found.append((slot, near[0] if near else copies[rank % len(copies)]))
    return found


def _move(layer: Any, wanted: Tensor) -> None:
    """Bring weights to the slots that change; first all of them beside the old ones, since those are still sent."""
    group, per_rank = layer.ep_group, layer.num_local_experts
    rank = group.rank()
    weights = _by_slot(layer)
    arriving: list[tuple[Tensor, Tensor]] = []
    operations = []
    for slot, source in sources(layer.slots.held, wanted, group.size()):
        to, come_from = slot // per_rank, source // per_rank
        if rank not in (to, come_from):
            continue
        for kind in sorted(weights):
            if come_from == rank:
                sent = weights[kind][source % per_rank].data.contiguous()
            if to == rank:
                old = weights[kind][slot % per_rank].data
                new = (
                    sent.clone()
                    if come_from == rank
                    else torch.empty_like(old, memory_format=torch.contiguous_format)
                )
                arriving.append((old, new))
                if come_from != rank:
                    operations.append(dist.P2POp(dist.irecv, new, group=group, group_peer=come_from))
            elif come_from == rank:
                operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=to))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    with torch.no_grad():
        for old, new in arriving:
            old.copy_(new)
    layer.place(wanted)


def _by_slot(layer: Any) -> dict[str, list[Tensor]]:
    """Parameters of this rank's slots by what they are: {"linear_fc1.weight": [slot 0's, …], …}; either backend."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, parameter in layer.experts.named_parameters():
        first, _, rest = name.partition(".")
        if first == "local_experts":
            number, _, kind = rest.partition(".")
        else:  # Transformer Engine's grouped layers: linear_fc1.weight0
            kind = name.rstrip("0123456789")
            number = name[len(kind) :]
        found.setdefault(kind, {})[int(number)] = parameter
    return {kind: [slots[i] for i in range(layer.num_local_experts)] for kind, slots in found.items()}
