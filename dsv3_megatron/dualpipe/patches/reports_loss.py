"""`training.is_pp_last_stage`, as the trainer's own module uses it: "does this rank have losses to report?".

The trainer prints and logs on the last rank of the job. Under DualPipeV that rank has no loss, and under DualPipe each
direction's losses arise on another rank, so our schedules return them on every pipeline rank.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def reports_loss(pp_group: Any) -> bool:
        from dsv3_megatron import dualpipe

        return True if dualpipe.placement() is not None else original(pp_group)

    return reports_loss


PATCH = Patch(
    name="reports_loss",
    target="megatron.training.training:is_pp_last_stage",
    signature="(pp_group)",
    why="DualPipe, DualPipeV: losses are returned on every pipeline rank, so that the last rank of the job logs them",
    install=_install,
)
