"""`fused_a2a.get_buffer`: DeepEP's buffer dispatches in FP8 where `--fp8-recipe dsv3` says so.

Megatron's dispatch and the backward pass of its combine give bf16 to `Buffer.dispatch`, which also takes E4M3 with its
scales. Both get their buffer from this function.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def get_buffer(group: Any, hidden_bytes: int) -> Any:
        from dsv3_megatron.fp8 import deepep

        buffer = original(group, hidden_bytes)
        return deepep.FP8Buffer(buffer) if deepep.sends_fp8(group) else buffer

    return get_buffer


PATCH = Patch(
    name="deepep_buffer",
    target="megatron.core.transformer.moe.fused_a2a:get_buffer",
    signature="(group, hidden_bytes)",
    why="--fp8-recipe dsv3 with --moe-token-dispatcher-type flex: DeepEP dispatches E4M3",
    install=_install,
)
