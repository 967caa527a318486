"""Measured times that all ranks deal by: the file of `--pipeline-costs`, read once and the same everywhere."""

from pathlib import Path

import torch.distributed as dist

from dsv3_megatron.pipeline.fit import read_costs
from dsv3_megatron.pipeline.simulate import Costs


def shared_costs(path: Path, num_stages: int) -> Costs:
    """Called by all ranks together. Tables of different times would pair wrong messages, of one shape, on NCCL.

    Once, since a profile of this run may write a file of that name.

    Raises:
        ValueError: on every rank, where a rank reads other times than rank 0, or cannot read them.
    """
    mine: Costs | str
    try:
        mine = read_costs(path, num_stages)
    except ValueError as error:
        mine = str(error)
    everyones: list[Costs | str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    for rank, costs in enumerate(everyones):
        if isinstance(costs, str):
            raise ValueError(f"--pipeline-costs, on rank {rank}: {costs}")
        if costs != everyones[0]:
            raise ValueError(
                f"--pipeline-costs {path}: rank {rank} reads other times in it than rank 0; "
                "give all machines the same file"
            )
    assert isinstance(mine, Costs)
    return mine
