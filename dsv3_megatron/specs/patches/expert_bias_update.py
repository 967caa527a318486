"""`moe_utils.get_updated_expert_bias`: the sign is exact for integer token counts.

Megatron compares each count with the mean load in fp32. The mean of a large batch is seldom a whole number
and rounds once the counts pass 2^24, and bf16 counts round from 2^8 on, so that the bias may move the wrong
way or not at all.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def get_updated_expert_bias(
        tokens_per_expert: torch.Tensor,
        expert_bias: torch.Tensor,
        expert_bias_update_rate: float,
        tp_dp_cp_group: Any = None,
    ) -> torch.Tensor:
        if tokens_per_expert.is_floating_point():  # Megatron's own router, in the same process
            return original(tokens_per_expert, expert_bias, expert_bias_update_rate, tp_dp_cp_group)
        from dsv3_megatron.specs.routing import (
            updated_bias,
        )  # late: listing the patches must not import the specs

        if tp_dp_cp_group is None:
            from megatron.core import parallel_state

            tp_dp_cp_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(tokens_per_expert, group=tp_dp_cp_group)
        return updated_bias(expert_bias, tokens_per_expert, expert_bias_update_rate)

    return get_updated_expert_bias


PATCH = Patch(
    name="expert_bias_update",
    target="megatron.core.transformer.moe.moe_utils:get_updated_expert_bias",
    signature="(tokens_per_expert, expert_bias, expert_bias_update_rate, tp_dp_cp_group=None)",
    why="the expert bias moves by the exact sign of integer token counts, not of fp32 ones",
    install=_install,
    also=("megatron.core.distributed.finalize_model_grads:get_updated_expert_bias",),
)
