"""Megatron's all-to-all dispatcher with experts that are not at home.

Tokens are permuted by expert, as ever, and only then put in the order of the slots; on the way back the other way
round. So every sum, there and in the gradients, has the order that it has with all experts at home.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from torch import Tensor

__all__ = ["placed"]

_classes: dict[type, type] = {}


def placed(dispatcher: Any) -> None:
    """Give an all-to-all dispatcher, Megatron's or that of FP8, the attribute `expert_of_slot` and what it does."""
    base = type(dispatcher)
    if base not in _classes:
        _classes[base] = type(f"Placed{base.__name__}", (_Placed, base), {})
    dispatcher.__class__ = _classes[base]
    dispatcher.expert_of_slot = None


class _Placed:
    """Mixed into a dispatcher's class.

    Attributes:
        expert_of_slot: [E] int64, the expert that each slot of the group holds; None where all are at home.
    """

    expert_of_slot: Tensor | None
    routing_map: Tensor
    permute_idx_device: Any
    config: Any

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Counts and splits are those of slots."""
        if self.expert_of_slot is not None:
            routing_map = routing_map[:, self.expert_of_slot]
        return super().preprocess(routing_map)  # type: ignore[misc]

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens expert by expert → slot by slot."""
        tokens, weights = super().dispatch_preprocess(hidden_states, routing_map, probs)  # type: ignore[misc]
        if self.expert_of_slot is None:
            return tokens, weights
        counts = self.routing_map.sum(0).to(self.permute_idx_device)
        order = self.expert_of_slot.to(self.permute_idx_device)
        self._slots = (counts[order], order.argsort())
        return self._sorted(tokens, counts, order, weights)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Outputs slot by slot → expert by expert."""
        if self.expert_of_slot is not None:
            permutated_local_input_tokens, _ = self._sorted(permutated_local_input_tokens, *self._slots)
        return super().combine_postprocess(permutated_local_input_tokens)  # type: ignore[misc]

    def _sorted(self, x: Tensor, counts: Tensor, order: Tensor, probs: Tensor | None = None) -> Any:
        with torch.autograd.profiler.record_function("expert_placement"):
            return sort_chunks_by_idxs(x, counts, order, probs=probs, fused=self.config.moe_permute_fusion)
