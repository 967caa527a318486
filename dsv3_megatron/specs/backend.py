"""What a backend provides: the module classes from which one set of specs is built."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Backend", "select_backend"]


@dataclass(frozen=True)
class Backend:
    """Module classes of one implementation.

    Attributes:
        norm: RMSNorm builder, called with config, hidden_size, eps.
        self_attention: subclass of MLASelfAttention.
        core_attention: causal attention with different head sizes for keys and values.
        column, row: tensor-parallel linear layers, split along the output and the input.
        duplicated: linear layer kept whole on every tensor-parallel rank (MLA's down projections).
        norm_column: RMSNorm and column-parallel linear in one module, or None where they are separate.
        routed_experts: builder of the local experts.
        dense_keys, moe_keys: prefixes of checkpoint keys to rename per layer, so that both backends save the
            same keys.
    """

    norm: Callable[..., Any]
    self_attention: type
    core_attention: type
    column: type
    row: type
    duplicated: type
    norm_column: type | None
    routed_experts: Callable[..., Any]
    dense_keys: dict[str, str] = field(default_factory=dict)
    moe_keys: dict[str, str] = field(default_factory=dict)


def select_backend(transformer_impl: str) -> Backend:
    """The backend for `--transformer-impl`: "local" is plain PyTorch, "transformer_engine" is TE.

    Raises:
        ValueError: any other name.
        ModuleNotFoundError: Transformer Engine is asked for and not installed.
    """
    if transformer_impl == "local":
        from dsv3_megatron.specs import reference

        return reference.BACKEND
    if transformer_impl == "transformer_engine":
        from dsv3_megatron.specs import te

        return te.BACKEND
    raise ValueError(
        f"--transformer-impl {transformer_impl}: --spec dsv3 has local (plain PyTorch) and transformer_engine"
    )
