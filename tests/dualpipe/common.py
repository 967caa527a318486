"""A step of `tests.parallel.common` under one of our schedules."""

import dataclasses
from typing import Any

import torch

from dsv3_megatron import dualpipe
from dsv3_megatron.dualpipe.ranks import Placement
from dsv3_megatron.pipeline.nominal import nominal_options
from dsv3_megatron.pipeline.placement import layer_layout, layers_per_stage
from tests.harness import run_distributed
from tests.parallel import common


@dataclasses.dataclass(frozen=True)
class ScheduledLayout(common.Layout):
    """A layout whose pipeline runs under `schedule` ("zb1p", "dualpipe" or "dualpipev") of `pp` ranks."""

    schedule: str = "dualpipe"
    pair_order: str = "megatron"
    chunks: int = 2
    table: tuple[tuple[str, Any], ...] = ()  # further arguments of `build_schedule`

    @property
    def placement(self) -> Placement | None:
        return None if self.schedule == "zb1p" else Placement(self.schedule, self.pp, self.chunks)

    @property
    def table_options(self) -> dict[str, Any]:
        if self.schedule != "zigzag":
            return {}
        return nominal_options(self.pp, self.chunks) | dict(self.table)

    def initialize(self) -> None:
        dualpipe.install()
        dualpipe.activate(self.schedule, self.placement)
        super().initialize()


@dataclasses.dataclass(frozen=True)
class ScheduledProblem(common.Problem):
    layers: tuple[int, ...] = ()  # of each stage; default as even as whole layers allow

    def config(self, layout):
        stages = layout.pp if layout.placement is None else layout.placement.num_stages
        notation = layer_layout(list(self.layers) or layers_per_stage(self.num_layers, stages), 1)
        config = super().config(dataclasses.replace(layout, stages=None))
        transformer = config.transformer
        transformer.deallocate_pipeline_outputs = True  # as in the trainer
        if layout.placement is not None:
            from dsv3_megatron.dualpipe.layout import VLayout

            transformer.pipeline_model_parallel_layout = VLayout(notation, layout.placement)
            transformer.virtual_pipeline_model_parallel_size = layout.placement.chunks
        return config


def train_rank(
    rank: int, world_size: int, layout: ScheduledLayout, problem: ScheduledProblem
) -> common.RankResult:
    """As `tests.parallel.common.train_rank`, through the schedule's own forward-backward function."""
    from dsv3_megatron.dualpipe.schedule import PipelineSchedule

    function = PipelineSchedule(
        layout.schedule, layout.pp, layout.placement, 60, layout.pair_order, table=layout.table_options
    )
    return common.train_rank(rank, world_size, layout, problem, forward_backward=function)


def run_step(layout: ScheduledLayout, problem: ScheduledProblem, timeout: float = 120) -> common.StepResult:
    ranks = run_distributed(
        train_rank, world_size=layout.world_size, timeout=timeout, layout=layout, problem=problem
    )
    return common.join(ranks)


def reference(problem: ScheduledProblem) -> common.StepResult:
    """The same problem in one process, as Megatron runs it."""
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(common.Problem)}
    return common.run_step(common.Layout(), common.Problem(**fields))


FP64 = torch.float64
