"""MLPs of the reference backend whose down projection takes SwiGLU's input: dense, shared and routed experts."""

from functools import partial
from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from dsv3_megatron.fp8.linear import FP8ColumnLinear, FP8DownProjection

__all__ = ["FP8MLP", "FP8SharedExpertMLP", "routed_experts"]


class FP8MLP(MLP):
    """Megatron's MLP around an `FP8DownProjection`, which does the SwiGLU."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [..., h], per_token_scale [...] (a routed expert's weight of each token) → [..., h], None."""
        u, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2((u, per_token_scale))


class FP8SharedExpertMLP(SharedExpertMLP, FP8MLP):
    """Megatron's shared expert, whose forward calls the one above."""


class FP8Experts(SequentialMLP):
    """The local experts one after the other, each an `FP8MLP`; tiles never span two experts."""

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: MLPSubmodules,
        pg_collection: Any = None,
        name: str | None = None,
    ):
        super().__init__(0, config, submodules, pg_collection, name)
        self.num_local_experts = num_local_experts
        for _ in range(num_local_experts):
            self.local_experts.append(
                FP8MLP(
                    self.config,
                    submodules,
                    is_expert=True,
                    ffn_hidden_size=self.config.moe_ffn_hidden_size,
                    tp_group=pg_collection.expt_tp,
                )
            )


def routed_experts() -> ExpertsBuilder:
    """As `dsv3_megatron.backends.experts.routed_experts`, with FP8 products."""
    return partial(
        FP8Experts, submodules=MLPSubmodules(linear_fc1=FP8ColumnLinear, linear_fc2=FP8DownProjection)
    )
