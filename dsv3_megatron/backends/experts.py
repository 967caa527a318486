"""Routed and shared experts of the reference backend, from Megatron's own classes and our linear layers."""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from torch import Tensor

from dsv3_megatron.backends.linear import ColumnLinear, RowLinear

__all__ = ["LocalExperts", "routed_experts"]


class LocalExperts(SequentialMLP):
    """Megatron's experts, one after the other; in inference only those that have tokens, and nothing around them."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Hidden states [t, h] sorted by expert, tokens of each expert, probabilities [t] → [t, h], no bias."""
        if not (torch.is_inference_mode_enabled() and self._is_plain()):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.tolist()
        outputs = [
            self._swiglu(expert, x, p)
            for expert, x, p in zip(
                self.local_experts,
                permuted_local_hidden_states.split(counts),
                permuted_probs.split(counts),
                strict=True,
            )
            if len(x)
        ]
        if not outputs:
            return permuted_local_hidden_states, None
        return torch.cat(outputs), None

    def _is_plain(self) -> bool:
        """Whether each expert is SwiGLU between our own layers, whole on this rank."""
        expert, config = self.local_experts[0], self.config
        return (
            type(expert.linear_fc1) is ColumnLinear
            and type(expert.linear_fc2) is RowLinear
            and self.tp_group.size() == 1
            and config.activation_func is F.silu
            and config.gated_linear_unit
            and not config.glu_linear_offset
            and config.activation_func_clamp_value is None
            and not config.moe_apply_probs_on_input
        )

    @staticmethod
    def _swiglu(expert: torch.nn.Module, x: Tensor, probs: Tensor) -> Tensor:
        gate, up = torch.matmul(x, expert.linear_fc1.weight.t()).chunk(2, dim=-1)
        inner = (F.silu(gate) * up * probs.unsqueeze(-1)).to(x.dtype)
        return torch.matmul(inner, expert.linear_fc2.weight.t())


def routed_experts() -> ExpertsBuilder:
    """The local experts one after the other (SequentialMLP), each a SwiGLU MLP with `backward_dw()`.

    An expert without tokens runs on an empty batch in training, so its weights get zero gradients, not None, and its
    weight gradients queue like the others'. Checkpoint keys and shards are those of Megatron's grouped
    experts, so that both backends and any expert-parallel size load each other's checkpoints.
    """
    return partial(LocalExperts, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear))
