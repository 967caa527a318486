"""What a backend provides: the module classes from which one set of specs is built."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.fp8.precision import recipe_of

__all__ = ["Backend", "select_backend"]


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


def select_backend(config: TransformerConfig) -> Backend:
    """The backend for `--transformer-impl` ("local" is plain PyTorch, "transformer_engine" is TE) and `--fp8-recipe`.

    Raises:
        ValueError: any other name.
        ModuleNotFoundError: Transformer Engine is asked for and not installed.
    """
    if config.transformer_impl == "local":
        from dsv3_megatron.backends import reference

        if recipe_of(config) is None:
            return reference.BACKEND
        from dsv3_megatron.fp8 import backend

        return backend.BACKEND
    if config.transformer_impl == "transformer_engine":
        from dsv3_megatron.backends import te

        if recipe_of(config) is None:
            return te.BACKEND
        from dsv3_megatron.fp8 import te_backend

        return te_backend.BACKEND
    raise ValueError(
        f"--transformer-impl {config.transformer_impl}: --spec dsv3 has local (plain PyTorch) and transformer_engine"
    )
