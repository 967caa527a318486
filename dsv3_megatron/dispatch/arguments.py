"""Options of the two-hop dispatcher."""

import os
from argparse import ArgumentParser
from typing import Any

from dsv3_megatron.dispatch.active import Settings, activate

__all__ = ["TWO_HOP", "add_arguments", "know_two_hop", "node_size", "use"]

TWO_HOP = "two_hop"


def know_two_hop(parser: ArgumentParser) -> ArgumentParser:
    """Let Megatron's `--moe-token-dispatcher-type` take our name. Idempotent."""
    for action in parser._actions:
        if action.dest == "moe_token_dispatcher_type" and TWO_HOP not in (action.choices or ()):
            action.choices = [*(action.choices or ()), TWO_HOP]
    return parser


def add_arguments(parser: ArgumentParser) -> None:
    """Let Megatron's `--moe-token-dispatcher-type` take our name, and add our options."""
    know_two_hop(parser)
    group = parser.add_argument_group("dsv3 dispatch")
    group.add_argument(
        "--moe-node-size",
        type=int,
        help=f"ranks that share a machine, for --moe-token-dispatcher-type {TWO_HOP} (default: torchrun's local ranks)",
    )
    group.add_argument(
        "--moe-two-hop-chunks",
        type=int,
        help="pieces in which tokens go through the two hops, one's second beside the next one's first "
        f"(default: {Settings.num_chunks}, as many as the report's channels)",
    )
    group.add_argument(
        "--communication-sms",
        type=int,
        help="SMs that dispatch and combine may take; the planner counts with them "
        f"(default: {Settings.communication_sms}, the report's)",
    )


def node_size(args: Any) -> int:
    """Ranks per machine: as given, else those that torchrun has started here."""
    if args.moe_node_size is not None:
        return args.moe_node_size
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def use(args: Any) -> None:
    """Activate what Megatron's validated arguments say, and count bytes where there is something to count."""
    if args.moe_token_dispatcher_type != TWO_HOP:
        return
    chunks, sms = args.moe_two_hop_chunks, args.communication_sms
    activate(
        node_size(args),
        Settings.num_chunks if chunks is None else chunks,
        Settings.communication_sms if sms is None else sms,
    )
    from dsv3_megatron import metrics
    from dsv3_megatron.dispatch import counting
    from dsv3_megatron.training import hooks

    hooks.before_step(counting.begin_step)
    hooks.after_step(counting.end_step)
    metrics.add_figures(counting.figures)
