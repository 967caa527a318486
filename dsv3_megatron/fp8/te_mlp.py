"""MLPs on Transformer Engine that keep of SwiGLU its input in E4M3 (`swiglu_layer`): dense, shared and routed experts.

Imported only when `--transformer-impl transformer_engine` is chosen. Dense and shared experts are `mlp.FP8MLP` and
`mlp.FP8SharedExpertMLP` as on the reference backend, around the down projection below.
"""

from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
    set_save_original_input,
)
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from megatron.core.transformer.moe.moe_utils import skip_routed_expert_padding
from torch import Tensor

from dsv3_megatron.fp8.swiglu_layer import TakesSwiGLUInput

__all__ = ["FP8GroupedMLP", "TEDownProjection", "TEGroupedDownProjection", "routed_experts"]


class TEDownProjection(TakesSwiGLUInput, TERowParallelLinear):
    """TE's second Linear of an MLP."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        set_save_original_input(self)


class TEGroupedDownProjection(TakesSwiGLUInput, TERowParallelGroupedLinear):
    """The second Linears of the local experts, one grouped product."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        set_save_original_input(self)


class FP8GroupedMLP(TEGroupedMLP):
    """Megatron's experts around a `TEGroupedDownProjection`, which does the SwiGLU."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self._with_fused_impl:
            raise ValueError(
                "--use-transformer-engine-op-fuser keeps SwiGLU's input in bf16: leave it out with --fp8-recipe dsv3"
            )

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        output_buffer: Tensor | None = None,
        grad_input_buffer: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As `TEGroupedMLP`: tokens [n, h] in the order of the local experts, probs [n] → [n, h], None.

        Each expert's rows are filled up to what FP8 products need, unless router or dispatcher did so.
        """
        x, counts, probs = (
            permuted_local_hidden_states,
            tokens_per_expert.tolist(),
            permuted_probs.unsqueeze(-1),
        )
        pads = self.config.fp8 and not skip_routed_expert_padding(self.config)
        own_counts = counts
        if pads:
            probs, _ = self.quantization_padding(probs, own_counts)
            x, counts = self.quantization_padding(x, own_counts)
        u, _ = self.linear_fc1(x, counts)
        output, _ = self.linear_fc2((u, probs), counts)
        return self.quantization_unpadding(output, own_counts) if pads else output, None


def routed_experts() -> ExpertsBuilder:
    """Builder of the local experts."""
    submodules = GroupedMLPSubmodules(
        linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TEGroupedDownProjection
    )
    return partial(FP8GroupedMLP, submodules=submodules)
