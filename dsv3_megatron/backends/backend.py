"""What a backend provides: the module classes from which one set of specs is built."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

__all__ = ["Backend"]


@dataclass(frozen=True)
class Backend:
    """Module classes of one implementation.

    Attributes:
        norm: RMSNorm builder, called with config, hidden_size, eps.
        self_attention: subclass of MLASelfAttention.
        core_attention: causal attention with different head sizes for keys and values.
        column, row: tensor-parallel linear layers, split along the output and the input.
        attention_output, down_projection: the row-parallel layers after attention and at the end of an MLP.
        duplicated: linear layer kept whole on every tensor-parallel rank (MLA's down projections).
        norm_column: RMSNorm and column-parallel linear in one module, or None where they are separate.
        routed_experts: builder of the local experts.
        mlp, shared_expert, moe_layer: classes of the MLPs and of the MoE layer around them.
        dense_keys, moe_keys: prefixes of checkpoint keys to rename per layer, so that both backends save the
            same keys.
    """

    norm: Callable[..., Any]
    self_attention: type
    core_attention: type
    column: type
    row: type
    attention_output: type
    down_projection: type
    duplicated: type
    norm_column: type | None
    routed_experts: Callable[..., Any]
    mlp: Any = MLP
    shared_expert: type = SharedExpertMLP
    moe_layer: type = MoELayer
    dense_keys: dict[str, str] = field(default_factory=dict)
    moe_keys: dict[str, str] = field(default_factory=dict)
