"""The MoE layers of this rank, and which slot of them holds which expert."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from dsv3_megatron.expert_placement.alltoall import placed

__all__ = ["PlacedLayer", "find_layers"]

_SEQUENTIAL = re.compile(r"^local_experts\.(\d+)\.(.+)$")  # SequentialMLP
_GROUPED = re.compile(r"^(.+\.(?:weight|bias))(\d+)$")  # TEGroupedMLP


class PlacedLayer:
    """One MoE layer whose experts may be elsewhere than at home.

    Attributes:
        slots: [E] int64 on the CPU, the expert that each slot of the expert-parallel group holds.
        parameters: of this rank's slots, by what they are: `{"linear_fc1.weight": [slot 0's, slot 1's, …], …}`.
    """

    def __init__(self, module: MoELayer) -> None:
        self.module = module
        self.slots = torch.arange(module.config.num_moe_experts)
        self.parameters = _by_slot(module)
        if isinstance(module.token_dispatcher, MoEAlltoAllTokenDispatcher):
            placed(module.token_dispatcher)
        if not hasattr(
            module.token_dispatcher, "expert_of_slot"
        ):  # it would go on sending tokens to the old ranks
            raise ValueError(
                f"--expert-placement balanced: {type(module.token_dispatcher).__name__} knows no slots"
            )

    @property
    def per_rank(self) -> int:
        return self.module.num_local_experts

    @property
    def at_home(self) -> bool:
        return bool((self.slots == torch.arange(len(self.slots))).all())

    def place(self, slots: Tensor) -> None:
        """From the next pass on slots hold these experts; their tensors are already there."""
        self.slots = slots.clone()
        device = torch.cuda.current_device()
        self.module.token_dispatcher.expert_of_slot = None if self.at_home else slots.to(device)
        first = self.module.ep_group.rank() * self.per_rank
        # Global names of parameters follow (specs/names.py).
        self.module.local_expert_indices = slots[first : first + self.per_rank].tolist()


def find_layers(model: Iterable[torch.nn.Module]) -> list[PlacedLayer]:
    """The MoE layers of all chunks, in one order on all ranks of a stage."""
    modules = [module for chunk in model for module in chunk.modules() if isinstance(module, MoELayer)]
    return [PlacedLayer(module) for module in modules]


def _by_slot(module: Any) -> dict[str, list[torch.nn.Parameter]]:
    found: dict[str, dict[int, torch.nn.Parameter]] = {}
    for name, parameter in module.experts.named_parameters():
        if match := _SEQUENTIAL.match(name):
            slot, kind = int(match[1]), match[2]
        elif match := _GROUPED.match(name):
            kind, slot = match[1], int(match[2])
        else:
            raise ValueError(f"--expert-placement balanced: {name} is no parameter of a single expert")
        found.setdefault(kind, {})[slot] = parameter
    return {
        kind: [by_slot[i] for i in range(module.num_local_experts)] for kind, by_slot in sorted(found.items())
    }
