"""`checkpointing.read_metadata`: the iteration to load is one whose checkpoint is complete.

Megatron believes the tracker file: an empty one, left by a rank that was killed while it wrote it, ends the run with
status 0, and a checkpoint that lacks data is loaded until something fails.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def read_metadata(tracker_filename: str) -> tuple[int, bool]:
        from megatron.training import get_args

        from dsv3_megatron.resilience.saving import iteration_to_load

        if get_args().ckpt_format != "torch_dist":
            return original(tracker_filename)
        return iteration_to_load(tracker_filename)

    return read_metadata


PATCH = Patch(
    name="read_metadata",
    target="megatron.training.checkpointing:read_metadata",
    signature="(tracker_filename)",
    why="a run goes on from a complete checkpoint, whatever the tracker file says",
    install=_install,
)
