"""`parallel_state.is_pipeline_last_stage`: in a V the last stage is the last chunk of pipeline rank 0."""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def is_pipeline_last_stage(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
        from megatron.core import parallel_state

        from dsv3_megatron import dualpipe

        placement = dualpipe.placement()
        if placement is None:
            return original(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        holds = parallel_state.get_pipeline_model_parallel_rank() == 0
        return holds and (ignore_virtual or vp_stage == placement.chunks - 1)

    return is_pipeline_last_stage


PATCH = Patch(
    name="is_pipeline_last_stage",
    target="megatron.core.parallel_state:is_pipeline_last_stage",
    signature="(ignore_virtual=True, vp_stage=None)",
    why="DualPipe, DualPipeV: the last stage is on pipeline rank 0, beside the first",
    install=_install,
)
