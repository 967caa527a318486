"""Megatron's process groups for a V-shaped placement.

`install(placement)` makes `parallel_state.initialize_model_parallel` build them: the caller (our trainer, an unmodified
`pretrain`, a dry run) still asks for P pipeline ranks.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from dsv3_megatron.dualpipe.ranks import Placement


def initialize_model_parallel(original: Callable, placement: Placement, *args: Any, **kwargs: Any) -> None:
    """`parallel_state.initialize_model_parallel` for a placement; same arguments as the original.

    Megatron gets the V's number of pipeline ranks (and so twice the data-parallel size under DualPipe), its ranks are
    renumbered by `Placement.global_rank`, and two virtual stages are declared afterwards, because Megatron refuses them
    on a single pipeline rank, which DualPipe on two ranks is to it.
    """
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    world_size, columns = _columns(placement, arguments)
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
    with _renumbered(placement, world_size):
        original(*bound.args, **bound.kwargs)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)


def _columns(placement: Placement, arguments: dict[str, Any]) -> tuple[int, int]:
    world_size = torch.distributed.get_world_size()
    if arguments["pipeline_model_parallel_size"] != placement.num_ranks or world_size % placement.num_ranks:
        raise ValueError(
            f"--pipeline-model-parallel-size {arguments['pipeline_model_parallel_size']} does not fit the placement of "
            f"{placement.num_ranks} pipeline ranks on {world_size} ranks"
        )
    return world_size, world_size // placement.num_ranks


@contextmanager
def _renumbered(placement: Placement, world_size: int) -> Any:
    """Inside, Megatron's rank generators name the job's ranks, and groups keep the order they are given.

    torch sorts the ranks of a group by default; a mirrored pipeline runs through descending ones.
    """
    if not placement.mirrored:
        yield
        return
    get_ranks = parallel_state.RankGenerator.get_ranks
    new_group = torch.distributed.new_group

    @functools.wraps(get_ranks)
    def renumbered(self: Any, token: str) -> list[list[int]]:
        return [
            [placement.global_rank(rank, world_size) for rank in group] for group in get_ranks(self, token)
        ]

    parallel_state.RankGenerator.get_ranks = renumbered
    torch.distributed.new_group = functools.partial(new_group, sort_ranks=False)
    try:
        yield
    finally:
        parallel_state.RankGenerator.get_ranks = get_ranks
        torch.distributed.new_group = new_group
