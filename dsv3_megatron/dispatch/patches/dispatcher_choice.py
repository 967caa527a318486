"""`arguments.add_megatron_arguments`: `--moe-token-dispatcher-type` may be two_hop wherever the command line is parsed.

Our own options are added by `extra_args_provider`, but `pretrain` has the command line parsed once more without it, for
the options of fault tolerance, and refuses a choice that it does not know.
"""

import functools
from typing import Any

from dsv3_megatron.dispatch.arguments import know_two_hop
from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        return know_two_hop(original(parser))

    return add_megatron_arguments


PATCH = Patch(
    name="dispatcher_choice",
    target="megatron.training.arguments:add_megatron_arguments",
    signature="(parser)",
    why="--moe-token-dispatcher-type two_hop where Megatron parses without our options (ft_integration.setup)",
    install=_install,
)
