"""`checkpointing.get_rng_state`: random states are saved by pipeline rank of the job, under every schedule.

Megatron saves one state per rank of its pipeline group, and loads them where the numbers of pipeline ranks in the
arguments agree. DualPipe's pipeline group is half as long as the pipeline, so that neither it nor 1F1B could load what
the other saved.
"""

import functools
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.patching import Patch


@dataclass(frozen=True)
class _Place:
    """A rank's place in a process group, which is all that Megatron asks a group for here."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def get_rng_state(
        ckpt_format: str,
        tp_group: Any,
        pp_group: Any,
        dp_cp_group: Any = None,
        dp_group: Any = None,
        key_prefix: str = "",
    ) -> Any:
        from dsv3_megatron import dualpipe

        placement = dualpipe.placement()
        if placement is not None and placement.mirrored:
            from megatron.core import parallel_state
            from torch import distributed as dist

            replicas = dp_cp_group or parallel_state.get_data_parallel_group(with_context_parallel=True)
            columns = replicas.size() // 2  # the other half is on the mirrored pipeline rank
            pipeline_rank = placement.pipeline_rank(dist.get_rank(), dist.get_world_size())
            pp_group = _Place(pipeline_rank, placement.num_ranks)
            dp_cp_group = _Place(replicas.rank() % columns, columns)
        return original(ckpt_format, tp_group, pp_group, dp_cp_group, dp_group, key_prefix)

    return get_rng_state


PATCH = Patch(
    name="get_rng_state",
    target="megatron.training.checkpointing:get_rng_state",
    signature="(ckpt_format, tp_group, pp_group, dp_cp_group=None, dp_group=None, key_prefix='')",
    why="DualPipe: checkpoints hold the random states of all pipeline ranks, as under the other schedules",
    install=_install,
)
