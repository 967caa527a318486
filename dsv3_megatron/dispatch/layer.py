"""The MoE layer with the two-hop dispatcher, and how a run gets it."""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

from dsv3_megatron.dispatch.active import active
from dsv3_megatron.dispatch.arguments import TWO_HOP
from dsv3_megatron.dispatch.dispatcher import TwoHopTokenDispatcher
from dsv3_megatron.dispatch.links import connect
from dsv3_megatron.dispatch.patches.dispatcher_name import shown_as_alltoall

__all__ = ["TwoHopMoELayer", "before_build"]


class TwoHopMoELayer(MoELayer):
    """Megatron's MoE layer around `TwoHopTokenDispatcher`, in any precision."""

    token_dispatcher: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with shown_as_alltoall(config):  # Megatron's layer knows its own dispatchers only
            super().__init__(config, *args, **kwargs)
        self.token_dispatcher = TwoHopTokenDispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=kwargs.get("pg_collection"),
        )


def before_build(config: Any, pg_collection: Any) -> None:
    """Make the links, on every rank, before any module is built."""
    if config.moe_token_dispatcher_type == TWO_HOP:
        settings = active()
        connect(pg_collection.ep, settings.node_size, settings.communication_sms)
