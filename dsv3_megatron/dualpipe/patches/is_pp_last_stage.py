"""`pipeline_parallel.utils.is_pp_last_stage`: in a V the last stage is on the rank that holds the first."""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def is_pp_last_stage(pp_group: Any) -> bool:
        from dsv3_megatron import dualpipe

        if dualpipe.placement() is None:
            return original(pp_group)
        return pp_group.rank() == 0

    return is_pp_last_stage


PATCH = Patch(
    name="is_pp_last_stage",
    target="megatron.core.pipeline_parallel.utils:is_pp_last_stage",
    signature="(pp_group)",
    why="DualPipe, DualPipeV: the last stage is on pipeline rank 0, beside the first",
    install=_install,
    also=(
        "megatron.training.models.gpt:is_pp_last_stage",
        "megatron.core.models.common.language_module.language_module:is_pp_last_stage",
        "megatron.core.distributed.finalize_model_grads:is_pp_last_stage",
    ),
)
