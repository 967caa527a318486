"""`TransformerConfig.__post_init__`: `moe_token_dispatcher_type` may be two_hop.

What Megatron's validation says of its all-to-all dispatcher holds for ours: it takes part in the overlapped schedule and
pads for FP8. So it is shown that name while it validates.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from dsv3_megatron.dispatch.arguments import TWO_HOP
from dsv3_megatron.patching import Patch


@contextlib.contextmanager
def shown_as_alltoall(config: Any) -> Iterator[None]:
    """Inside, a two-hop configuration says alltoall."""
    two_hop = config.moe_token_dispatcher_type == TWO_HOP
    if two_hop:
        config.moe_token_dispatcher_type = "alltoall"
    try:
        yield
    finally:
        if two_hop:
            config.moe_token_dispatcher_type = TWO_HOP


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        with shown_as_alltoall(self):
            original(self)

    return __post_init__


PATCH = Patch(
    name="dispatcher_name",
    target="megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
    signature="(self)",
    why="--moe-token-dispatcher-type two_hop: validated as alltoall is, and kept",
    install=_install,
)
