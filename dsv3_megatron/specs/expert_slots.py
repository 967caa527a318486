"""Experts that have copies: slots on the GPUs, which of the model's experts each holds, and a MoE layer over them.

The router, its bias and its counts stay those of the logical experts. Between router and dispatcher `ExpertSlots`
takes each chosen expert to one of its copies, by the number of the token, so that copies share the work evenly.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from torch import Tensor

from dsv3_megatron.balance import rebalance_experts
from dsv3_megatron.specs.deployment import deployment_of
from dsv3_megatron.specs.router import DSV3Router

__all__ = ["ExpertSlots", "first_placement", "with_slots"]


class ExpertSlots:
    """Which expert each slot of an expert-parallel group holds, and how often each expert was chosen.

    Attributes:
        num_experts: slots of all ranks together; Megatron's word for them.
        num_choices: different experts; the last is the shared one where `shared_as_routed`.
        held: [slots] int64 on the CPU, the expert of each slot; rank r has the slots from r · slots / ranks on.
        load: [num_choices] int64, tokens of each expert since `clear`, those that fill up a pass among them.
    """

    def __init__(self, held: Tensor, num_choices: int, shared_as_routed: bool, rank: int):
        self.num_experts, self.num_choices = len(held), num_choices
        self.shared_as_routed, self._rank = shared_as_routed, rank
        self.load = torch.zeros(num_choices, dtype=torch.int64)
        self.place(held)

    def place(self, held: Tensor) -> None:
        """From the next pass on slots hold these experts; their weights are already there.

        Args:
            held: [slots] int64; every expert at least once.
        """
        counts = torch.bincount(held, minlength=self.num_choices)
        if len(held) != self.num_experts or len(counts) != self.num_choices or int(counts.min()) < 1:
            raise ValueError(f"{len(held)} slots: every one of {self.num_choices} experts needs one")
        self.held = held.clone()
        order = held.sort(stable=True).indices  # slots, grouped by expert
        first = counts.cumsum(0) - counts
        turn = torch.arange(int(counts.max()))
        # Copies over and over up to the largest number, so that the table has no holes.
        self._table = order[first[:, None] + turn % counts[:, None]]
        self._counts = counts

    def clear(self) -> None:
        """Begin to count anew."""
        self.load = torch.zeros_like(self.load)

    def __call__(self, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and logical experts [t, k] of each token → weights and slots [t, k], one more for the shared one."""
        device = indices.device
        if self._table.device != device:
            self._table, self._counts = self._table.to(device), self._counts.to(device)
            self.load = self.load.to(device)
        if self.shared_as_routed:
            shared = indices.new_full((len(indices), 1), self.num_choices - 1)
            indices = torch.cat([indices, shared], dim=1)
            weights = torch.cat([weights, weights.new_ones(len(weights), 1)], dim=1)
        self.load += torch.bincount(indices.flatten(), minlength=self.num_choices)
        token = torch.arange(len(indices), device=device).unsqueeze(1) + self._rank
        return weights, self._table[indices, token % self._counts[indices]]


def first_placement(num_slots: int, num_experts: int, shared_topk: int | None, num_ranks: int) -> Tensor:
    """[slots] before any load is known, as if all routed experts had the same.

    V3's decoding, 257 experts in 320 slots, gets 32 copies of the shared expert and 32 of routed ones, one slot per
    GPU: the 64 GPUs of report §3.4.2.

    Args:
        shared_topk: routed experts of a token, where the shared one is routed too: it has num_experts / topk times as
            much to do as one of them. Else None.
    """
    load = torch.ones(1, num_experts)
    if shared_topk is not None:
        load = torch.cat([load, torch.tensor([[num_experts / shared_topk]])], dim=1)
    held, _, _ = rebalance_experts(load, num_slots, 1, 1, num_ranks)
    return held[0]


def with_slots(base: type) -> type:
    """The backend's MoE layer over more experts than its router knows."""

    class SlottedMoELayer(base):  # type: ignore[misc, valid-type]
        """MoE layer whose experts are slots: built for their number, routed by the model's.

        Attributes:
            slots: which expert each slot holds.
        """

        slots: ExpertSlots

        def __init__(self, config: Any, submodules: MoESubmodules, *args: Any, **options: Any):
            deployment = deployment_of(config)
            physical = copy.copy(config)
            physical.num_moe_experts = deployment.num_slots(config.num_moe_experts)
            if deployment.shared_as_routed:
                physical.moe_router_topk = config.moe_router_topk + 1
                physical.moe_shared_expert_intermediate_size = None

            def logical_router(**given: Any) -> DSV3Router:
                return DSV3Router(**{**given, "config": config})

            super().__init__(physical, replace(submodules, router=logical_router), *args, **options)
            topk = config.moe_router_topk if deployment.shared_as_routed else None
            with (
                torch._C.DisableTorchFunction()
            ):  # a dry run makes meta tensors of all, and these are no weights
                held = first_placement(
                    physical.num_moe_experts, config.num_moe_experts, topk, self.ep_group.size()
                )
                choices = deployment.num_choices(config.num_moe_experts)
                self.slots = ExpertSlots(held, choices, deployment.shared_as_routed, self.ep_group.rank())
                self.router.physical_experts = self.slots
                self.place(held)

        def place(self, held: Tensor) -> None:
            """Slots hold these experts from now on; global names of the parameters follow (specs/names.py)."""
            self.slots.place(held)
            first = self.ep_group.rank() * self.num_local_experts
            self.local_expert_indices = held[first : first + self.num_local_experts].tolist()

    return SlottedMoELayer
