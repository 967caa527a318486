"""`checkpointing.save_checkpoint`: the former checkpoint stays whole until the new one is.

Megatron writes into a folder that may be there already: files of an interrupted save with another layout stay among the
new ones, and a complete checkpoint of the same iteration keeps its mark while its data is replaced.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        from dsv3_megatron.resilience.saving import around_save, by_name
        from dsv3_megatron.training.hooks import checkpoint

        call = by_name(original)(*args, **kwargs)
        with checkpoint(call):
            return around_save(original, call)

    return save_checkpoint


PATCH = Patch(
    name="save_checkpoint",
    target="megatron.training.checkpointing:save_checkpoint",
    signature=(
        "(iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
        "checkpointing_context=None, pipeline_rank=None, expert_rank=None, tensor_rank=None, pipeline_parallel=None, "
        "expert_parallel=None, non_persistent_ckpt=False, train_data_iterator=None, "
        "preprocess_common_state_dict_fn=None, release=False, tp_group=None, pp_group=None, dp_cp_group=None, "
        "dp_group=None, expt_dp_group=None, rng_state_key_prefix='')"
    ),
    why="a save that is cut short leaves no half checkpoint that could be taken for a whole one",
    install=_install,
    also=("megatron.training.training:save_checkpoint",),
)
