"""`pipeline_parallel.utils.get_pp_last_rank`: where per-token loss takes its token count from."""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def get_pp_last_rank(pp_group: Any) -> int:
        import torch

        from dsv3_megatron import dualpipe

        if dualpipe.placement() is None:
            return original(pp_group)
        return torch.distributed.get_process_group_ranks(pp_group)[0]

    return get_pp_last_rank


PATCH = Patch(
    name="get_pp_last_rank",
    target="megatron.core.pipeline_parallel.utils:get_pp_last_rank",
    signature="(pp_group)",
    why="DualPipe, DualPipeV: the rank with the loss is the first of the pipeline group",
    install=_install,
    also=("megatron.core.distributed.finalize_model_grads:get_pp_last_rank",),
)
