"""`parallel_state.initialize_model_parallel`: Megatron's groups for DualPipe's mirrored placement.

`pretrain` offers `skip_model_parallel_init`, but then every way in, the unmodified `pretrain_gpt.py` included, would
have to build the groups; and Megatron cannot be told of pipeline ranks that hold the same stages.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        from dsv3_megatron import dualpipe

        placement = dualpipe.placement()
        if placement is None:
            return original(*args, **kwargs)
        from dsv3_megatron.dualpipe import groups

        return groups.initialize_model_parallel(original, placement, *args, **kwargs)

    return initialize_model_parallel


PATCH = Patch(
    name="initialize_model_parallel",
    target="megatron.core.parallel_state:initialize_model_parallel",
    signature=(
        "(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, "
        "virtual_pipeline_model_parallel_size=None, pipeline_model_parallel_comm_backend=None, "
        "use_sharp=False, context_parallel_size=1, hierarchical_context_parallel_sizes=None, "
        "hybrid_context_parallel=False, expert_model_parallel_size=1, gtp_remat_size=1, "
        "expert_gtp_remat_size=1, num_distributed_optimizer_instances=1, "
        "expert_tensor_parallel_size=None, nccl_communicator_config_path=None, "
        "distributed_timeout_minutes=30, order='tp-cp-ep-dp-pp', get_embedding_ranks=None, "
        "get_position_embedding_ranks=None, create_gloo_process_groups=True, "
        "high_priority_stream_groups=None, sharp_enabled_group=None, rank_offset=0, "
        "local_world_size=None)"
    ),
    why="DualPipe: mirrored pipeline ranks are data-parallel replicas in every group",
    install=_install,
)
