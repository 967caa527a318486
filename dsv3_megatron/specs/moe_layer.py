"""Which MoE layer a configuration gets: the backend's, or that of a dispatcher which a feature has registered."""

from typing import Any

from dsv3_megatron.backends.backend import Backend

__all__ = ["moe_layer_of", "register"]

_of_dispatcher: dict[str, type] = {}


def register(dispatcher: str, layer: type) -> None:
    """Use `layer`, a subclass of Megatron's MoELayer, for `--moe-token-dispatcher-type ‹dispatcher›`."""
    _of_dispatcher[dispatcher] = layer


def moe_layer_of(config: Any, backend: Backend) -> type:
    """The class of the MoE layers."""
    return _of_dispatcher.get(config.moe_token_dispatcher_type, backend.moe_layer)
