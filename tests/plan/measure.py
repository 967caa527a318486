"""Peak bytes of live tensors in real training steps of a micro model, on every rank."""

from typing import Any

import torch

from tests.dualpipe.common import ScheduledLayout, ScheduledProblem
from tests.harness import run_distributed
from tests.parallel import common
from tests.plan.live_tensors import LiveTensors


def run(layout: common.Layout, problem: ScheduledProblem, timeout: float = 240) -> list[int]:
    """Per rank, the peak of one step after a first one, parameters and gradients included."""
    return run_distributed(_peak_of_rank, layout.world_size, timeout=timeout, layout=layout, problem=problem)


def _peak_of_rank(rank: int, world_size: int, layout: common.Layout, problem: ScheduledProblem) -> int:
    layout.initialize()
    config = problem.config(layout)
    chunks = common.build_chunks(config, problem)
    common.prepare(chunks, problem)
    batch = problem.global_batch(config.vocab_size)
    function = _forward_backward(layout)
    common.step(chunks, problem, batch, function)  # groups and buffers that are made once
    live = LiveTensors(resident(chunks), ignored=batch.values())
    with live:
        common.step(chunks, problem, batch, function)
    return live.peak


def _forward_backward(layout: common.Layout) -> Any:
    """Megatron's own for a plain layout, else ours, in one thread so that every tensor is seen."""
    if not isinstance(layout, ScheduledLayout):
        return None
    from dsv3_megatron.dualpipe.schedule import PipelineSchedule

    function = PipelineSchedule(
        layout.schedule, layout.pp, layout.placement, 120, layout.pair_order, table=layout.table_options
    )
    function.pairs.thread = None
    return function


def resident(chunks: list[torch.nn.Module]) -> list[torch.Tensor]:
    """Parameters, buffers, and DDP's gradient buffers."""
    tensors: list[torch.Tensor] = []
    for chunk in chunks:
        tensors += [*chunk.parameters(), *torch.nn.Module.buffers(chunk)]
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:  # type: ignore[misc]
            tensors += [t for t in (buffer.grad_data, buffer.param_data) if t is not None]
    return tensors
