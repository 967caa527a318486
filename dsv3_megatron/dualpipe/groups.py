"""Megatron's process groups for a V-shaped placement.

The patch `initialize_model_parallel` builds them so: the caller (our trainer, an unmodified `pretrain`, a dry run)
still asks for P pipeline ranks.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from dsv3_megatron.dualpipe.ranks import Placement


def initialize_model_parallel(original: Callable, placement: Placement, *args: Any, **kwargs: Any) -> None:
    """`parallel_state.initialize_model_parallel` for a placement; same arguments as the original.

    Megatron gets the V's number of pipeline ranks (and so twice the data-parallel size under DualPipe), and the virtual
    stages are declared afterwards, because Megatron refuses them on a single pipeline rank, which DualPipe on two ranks
    is to it.
    """
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    columns = _columns(placement, arguments)
    expert_block = (
        arguments["expert_tensor_parallel_size"] or arguments["tensor_model_parallel_size"]
    ) * arguments["expert_model_parallel_size"]
    if placement.mirrored and columns % expert_block:
        raise ValueError(
            f"--expert-model-parallel-size {arguments['expert_model_parallel_size']}: an expert-parallel group must "
            f"lie on one pipeline rank, so it must divide the {columns} ranks beside each other there"
        )
    if arguments["order"] != "tp-cp-ep-dp-pp":
        raise ValueError(
            f"--use-tp-pp-dp-mapping does not work with --pipeline-schedule {placement.schedule}"
        )
    arguments["pipeline_model_parallel_size"] = placement.v_size
    arguments["virtual_pipeline_model_parallel_size"] = None
    # First stage, last stage and MTP share one embedding on one rank: there is no copy to keep equal.
    arguments["get_embedding_ranks"] = lambda ranks, *_: [ranks[0]]
    original(*bound.args, **bound.kwargs)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(placement.chunks)


def _columns(placement: Placement, arguments: dict[str, Any]) -> int:
    world_size = torch.distributed.get_world_size()
    if arguments["pipeline_model_parallel_size"] != placement.num_ranks or world_size % placement.num_ranks:
        raise ValueError(
            f"--pipeline-model-parallel-size {arguments['pipeline_model_parallel_size']} does not fit the placement of "
            f"{placement.num_ranks} pipeline ranks on {world_size} ranks"
        )
    return world_size // placement.num_ranks
