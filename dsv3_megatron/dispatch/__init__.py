"""Dispatch in two hops: `--moe-token-dispatcher-type two_hop` (report §3.2.2; docs/dispatch.md).

volume.py      bytes over each kind of link, expected and counted (pure)
route.py       which row goes where (pure)
wire.py        rows as bytes, E4M3 where the recipe says so
links.py       the rail across nodes and the node: process groups, bytes counted
hops.py        rows through the hops, there and back, and their gradients
dispatcher.py  Megatron's interface around them
layer.py       the MoE layer that has it
"""

from dsv3_megatron.dispatch.active import activate
from dsv3_megatron.dispatch.volume import expected_bytes

__all__ = ["activate", "expected_bytes", "install"]


def install() -> None:
    """Make the dispatcher known to a run; nothing changes until a configuration names it."""
    from dsv3_megatron import patching
    from dsv3_megatron.dispatch import arguments, layer
    from dsv3_megatron.specs import moe_layer
    from dsv3_megatron.training import hooks

    patching.install(["dispatcher_name", "dispatcher_choice"])
    moe_layer.register(arguments.TWO_HOP, layer.TwoHopMoELayer)
    hooks.after_validation(arguments.use)
    hooks.before_build(layer.before_build)
