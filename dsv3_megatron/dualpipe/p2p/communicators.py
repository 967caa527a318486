"""The communicators of a job's pipelines: made by all ranks in one order, and used once before they are needed.

On NCCL a communicator is made when it is first used, inside the call, which blocks until all its ranks have come; so is
the connection between two ranks. Nothing of that may be left for a step, where two ranks can each stand in the making
of another one.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron import cpu
from dsv3_megatron.pipeline.operations import Backend

ClassGroups = dict[tuple[str, bool], dist.ProcessGroup]  # (payload, down the ranks)


def carrier() -> Backend:
    """Which form messages take in this job: gloo's on gloo, else NCCL's (a fake group's too, whose record is kept)."""
    return "gloo" if _device_backend() == "gloo" and not cpu.is_like_nccl() else "nccl"


def all_pipelines(ranks: Sequence[int], world_size: int) -> list[list[int]]:
    """The ranks of all pipelines of a job, from those of one: pipelines lie beside each other, in blocks.

    Args:
        ranks: global ranks of a pipeline by pipeline rank, equally spaced, as Megatron places them.
    """
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    block = stride * len(ranks)
    return [
        list(range(first, first + block, stride))
        for start in range(0, world_size, block)
        for first in range(start, start + stride)
    ]


def gloo_groups(ranks: Sequence[int], pipelines: Sequence[Sequence[int]], timeout_s: float) -> ClassGroups:
    """A group for each payload and way along the ranks: a receive posted ahead holds up what shares its group."""
    own: ClassGroups = {}
    for pipeline in _with(ranks, pipelines):
        for payload in ("activation", "gradient"):
            for down in (True, False):
                group = dist.new_group(pipeline, timeout=timedelta(seconds=timeout_s))
                if pipeline == list(ranks):
                    own[payload, down] = group
    return own


def nccl_group(
    ranks: Sequence[int], pipelines: Sequence[Sequence[int]], timeout_s: float, max_ctas: int
) -> dist.ProcessGroup:
    """One communicator for all messages of the pipeline, in use.

    Its own time limit, which kills the process without a word about the message, comes after the watch's.
    """
    own: Any = None
    for pipeline in _with(ranks, pipelines):
        group = dist.new_group(
            pipeline,
            timeout=timedelta(seconds=2 * timeout_s + 60),
            pg_options=_nccl_options(max_ctas),
            group_desc="pipeline messages",
        )
        if pipeline == list(ranks):
            own = group
    warm_up([own])
    _connect(own, ranks)
    return own


def warm_up(groups: Iterable[dist.ProcessGroup], all_to_all: Iterable[dist.ProcessGroup] = ()) -> None:
    """Use these groups of the calling rank for the first time, in this order, which must be that of all ranks.

    Args:
        groups: get an all-reduce.
        all_to_all: those of them that also get an all-to-all (its connections are made when they are first used).
    """
    device = torch.cuda.current_device()
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    for group in all_to_all:
        if group.size() > 1:
            ones = torch.ones(group.size(), device=device)
            dist.all_to_all_single(torch.empty_like(ones), ones, group=group)
    torch.cuda.synchronize()


def _connect(group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
    """A message with each neighbour, the last rank's being the first (chunks that are interleaved), in one batch."""
    device = torch.cuda.current_device()
    rank = ranks.index(dist.get_rank())
    peers = sorted({(rank - 1) % len(ranks), (rank + 1) % len(ranks)} - {rank})
    operations = []
    for peer in peers:
        for operation in (dist.isend, dist.irecv):
            operations.append(dist.P2POp(operation, torch.zeros(1, device=device), ranks[peer], group))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    torch.cuda.synchronize()


def _device_backend() -> str:
    """What carries tensors of the job's devices, which on CPU are the CPU's."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config().split(","))
    return str(backends.get("cuda", backends.get("cpu", "")))


def _with(ranks: Sequence[int], pipelines: Sequence[Sequence[int]]) -> list[list[int]]:
    lists = [list(pipeline) for pipeline in pipelines]
    if list(ranks) not in lists:
        raise ValueError(f"pipelines={lists}: the ranks {list(ranks)} are none of them")
    return lists


def _nccl_options(max_ctas: int) -> Any:
    """Options of an NCCL group, None where another backend carries it."""
    if _device_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = max_ctas
    options.config.min_ctas = 1
    return options
