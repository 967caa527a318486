"""The MoE layer of the reference backend: Megatron's, and in inference on one rank without a dispatch."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from dsv3_megatron.backends.experts import LocalExperts, plain_swiglu

__all__ = ["ReferenceMoELayer"]


class ReferenceMoELayer(MoELayer):
    """Where all experts are on this rank, a token in inference goes to them directly.

    Megatron's dispatcher sorts, pads and exchanges whatever the number of ranks, which for the few tokens of a decode
    step takes longer than the experts do.
    """

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Any:
        """As Megatron's: [s, b, h] → ([s, b, h], None)."""
        if not (torch.is_inference_mode_enabled() and self._is_local() and padding_mask is None):
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        probs, routing_map = self.route(hidden_states)
        expert, token = routing_map.t().nonzero(as_tuple=True)  # sorted by expert
        tokens = hidden_states.flatten(0, 1)
        chosen, _ = self.experts(tokens[token], routing_map.sum(dim=0), probs[token, expert])
        output = torch.zeros_like(tokens).index_add_(0, token, chosen).view_as(hidden_states)
        shared = None
        if self.use_shared_expert:
            shared = plain_swiglu(self.shared_experts, hidden_states)
            if shared is None:
                shared = self.shared_experts_compute(hidden_states)
        return output if shared is None else output + shared, None

    def _is_local(self) -> bool:
        return (
            self.ep_group.size() == 1
            and self.attn_tp_group.size() == 1
            and isinstance(self.experts, LocalExperts)
            and not self.config.moe_latent_size
            and not self.shared_expert_overlap
        )
