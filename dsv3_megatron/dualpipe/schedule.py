"""`forward_backward_func` for Megatron: one step of a table over this rank's model chunks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.utils import set_streams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from dsv3_megatron.dualpipe.chunk import ChunkStage, Step
from dsv3_megatron.dualpipe.embedding import shares_embedding
from dsv3_megatron.dualpipe.gradients import GradientReduce
from dsv3_megatron.dualpipe.loss_reports import share
from dsv3_megatron.dualpipe.microbatch_data import chunk_iterators
from dsv3_megatron.dualpipe.overlap import PairRunner
from dsv3_megatron.dualpipe.p2p import MAX_CTAS, PipelineP2P, all_pipelines, carrier, warm_up
from dsv3_megatron.dualpipe.profile import StepProfile
from dsv3_megatron.dualpipe.ranks import Placement
from dsv3_megatron.dualpipe.shared_costs import shared_costs
from dsv3_megatron.pipeline import Message, build_schedule
from dsv3_megatron.pipeline.runner import PipelineRunner

# Groups that communicate inside a step, in the order in which all ranks use them for the first time.
STEP_GROUPS = (
    *("tp", "cp", "tp_cp", "expt_tp", "ep", "tp_ep"),
    *("dp", "dp_cp", "expt_dp", "intra_dp_cp", "intra_expt_dp", "inter_dist_opt", "pp"),
)
ALL_TO_ALL_GROUPS = ("ep", "tp_ep")


class PipelineSchedule:
    """Megatron's forward-backward function for a schedule of `dsv3_megatron.pipeline`.

    Built once and called by the trainer for every training and evaluation step with Megatron's own keywords; returns
    what Megatron's schedules return, except that losses come back on every pipeline rank (see the patch reports_loss).

    Args:
        name: schedule as `build_schedule` knows it.
        num_ranks: pipeline ranks of the job.
        placement: the V-shaped placement, None where Megatron's own holds (zb1p).
        timeout_s: a pipeline message that takes longer is an error.
        pair_order: a name of `overlap.ORDERS`.
        plans: whether chunks with expert parallelism run through Megatron's schedule plans, so that pairs overlap; not
            with document boundaries and MTP, since the plans' MTP node takes none.
        max_ctas: on NCCL, the most thread blocks of a pipeline message's kernel.
        table: further arguments of `build_schedule`.
    """

    def __init__(
        self,
        name: str,
        num_ranks: int,
        placement: Placement | None,
        timeout_s: float,
        pair_order: str = "megatron",
        plans: bool = True,
        max_ctas: int = MAX_CTAS,
        table: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.table = table or {}
        self.plans = plans
        self.num_ranks = num_ranks
        self.placement = placement
        self.timeout_s = timeout_s
        self.max_ctas = max_ctas
        self.pairs = PairRunner(pair_order)
        self.profile: StepProfile | None = None
        self._p2p: PipelineP2P | None = None
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self._stages: dict[int, ChunkStage] = {}
        self._reduce: GradientReduce | None = None
        self._runners: dict[tuple[int, bool], PipelineRunner] = {}

    @property
    def num_directions(self) -> int:
        return 2 if self.placement is not None and self.placement.mirrored else 1

    def __call__(
        self,
        *,
        forward_step_func: Callable,
        data_iterator: Iterator | list[Iterator],
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable | None = None,
        p2p_communicator: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool | None = False,
    ) -> list[Any]:
        """Run one step; keywords and result as in `schedules.forward_backward_pipelining_with_interleaving`.

        `num_microbatches` counts those of one direction, since Megatron takes a mirrored rank for a replica.
        """
        if adjust_tensor_shapes_fn is not None or p2p_communicator is not None:
            raise ValueError(
                f"--pipeline-schedule {self.name} takes no adjust_tensor_shapes_fn and no p2p_communicator"
            )
        chunks = model if isinstance(model, list) else [model]
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        config = get_model_config(chunks[0])
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        timers = config.timers
        if timers is not None:
            timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        self._build(chunks, groups)
        self._set_shape(config, seq_length, micro_batch_size, decoder_seq_length, groups)
        assert self._reduce is not None
        step = Step(
            config=config,
            forward_step_func=forward_step_func,
            num_microbatches=num_microbatches,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
            cp_size=groups.cp.size(),
            use_plans=self.plans and uses_plans(config) and not forward_only,
            reduce=self._reduce,
        )
        if step.use_plans:
            set_streams(high_priority=config.high_priority_a2a_comm_stream)
        data = self._data(iterators, num_microbatches)
        for index, stage in enumerate(sorted(self._stages)):
            self._stages[stage].begin(step, data[index])
        runner = self._runner(num_microbatches, forward_only)
        profile = None if forward_only else self._due_profile()
        if not forward_only:
            self._reduce.begin(bool(force_all_reduce))
        with torch.no_grad() if forward_only else contextlib.nullcontext():
            if profile is None:
                runner.step()
            else:
                self.pairs.events = [] if self.pairs.thread else None
                clock = profile.begin()
                events = runner.step(clock.start, clock)
                profile.finish(runner.schedule, events, self.pairs.events or [])
                self.pairs.events = None
        if config.finalize_model_grads_func is not None and not forward_only:
            config.finalize_model_grads_func(
                chunks,
                step.num_tokens.to(torch.cuda.current_device()) if config.calculate_per_token_loss else None,
                pg_collection=groups,
                force_all_reduce=force_all_reduce,
            )
        if timers is not None:
            timers("forward-backward").stop()
        if collect_non_loss_data or self.placement is None:
            return step.losses
        return share(step.losses, groups.pp, training=not forward_only)

    # --- built once

    def _build(self, chunks: list[Any], groups: ProcessGroupCollection) -> None:
        """Stages and communicators, at the first call; the model chunks stay the same objects."""
        if self._stages:
            return
        rank = self.pipeline_rank
        num_stages = self.placement.num_stages if self.placement else self.num_ranks
        numbers = self.placement.stages(rank) if self.placement else (rank,)
        assert len(chunks) == len(numbers), f"{len(chunks)} model chunks for the stages {numbers}"
        self._stages = {
            number: ChunkStage(chunk, number, num_stages)
            for number, chunk in zip(numbers, chunks, strict=True)
        }
        costs = self.table.get("costs")
        if isinstance(costs, str | Path):
            self.table = self.table | {"costs": shared_costs(Path(costs), num_stages)}
        last = num_stages - 1
        writers = {0: [last]} if last in numbers and shares_embedding(chunks[-1]) else {}
        self._reduce = GradientReduce(dict(zip(numbers, chunks, strict=True)), writers)
        pipelines = self._pipelines()
        if self.num_ranks > 1:
            if carrier() == "nccl":
                warm_up(_members(groups, STEP_GROUPS), _members(groups, ALL_TO_ALL_GROUPS))
            self._p2p = PipelineP2P(
                self._pipeline_ranks(),
                self._spec,
                torch.cuda.current_device(),
                self.timeout_s,
                pipelines=pipelines,
                max_ctas=self.max_ctas,
            )
        if self.profile is not None:
            self.profile.join(pipelines[0])

    @property
    def pipeline_rank(self) -> int:
        if self.placement is None:
            return parallel_state.get_pipeline_model_parallel_rank()
        return self.placement.pipeline_rank(dist.get_rank(), dist.get_world_size())

    def _pipeline_ranks(self) -> list[int]:
        if self.placement is None:
            return dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        return self.placement.pipeline_ranks(dist.get_rank(), dist.get_world_size())

    def _pipelines(self) -> list[list[int]]:
        """Those of the whole job, in one order."""
        if self.placement is None:
            return all_pipelines(self._pipeline_ranks(), dist.get_world_size())
        return self.placement.pipelines(dist.get_world_size())

    def _runner(self, num_microbatches: int, forward_only: bool) -> PipelineRunner:
        key = (num_microbatches, forward_only)
        if key not in self._runners:
            table = build_schedule(
                self.name, self.num_ranks, num_microbatches * self.num_directions, **self.table
            )
            if forward_only:
                table = table.forward_only()
            self._runners[key] = PipelineRunner(
                table, self.pipeline_rank, self._stages, self._p2p, self.pairs
            )
        return self._runners[key]

    # --- per step

    def _due_profile(self) -> StepProfile | None:
        """The profile, if this rank records this step."""
        if self.profile is None or not self.profile.is_due(self._pipeline_ranks()):
            return None
        return self.profile

    def _set_shape(
        self, config: Any, seq_length: int, micro_batch_size: int, decoder_seq_length: int | None, groups: Any
    ) -> None:
        shapes = schedules.get_tensor_shapes(
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=decoder_seq_length,
            config=config,
            tp_group=groups.tp,
            cp_group=groups.cp,
        )
        self._shape, self._dtype = shapes[0], config.pipeline_dtype

    def _spec(self, message: Message) -> tuple[tuple[int, ...], torch.dtype]:
        return self._shape, self._dtype

    def _data(self, iterators: list, num_microbatches: int) -> list:
        if self.placement is None:
            return iterators
        mirror = None
        if self.placement.mirrored:
            ranks = self._pipeline_ranks()
            mirror = ranks[self.placement.mirror(self.pipeline_rank)]
        # In the middle of a V no chunk reads anything, or all do (packed sequences).
        return chunk_iterators(
            iterators[0],
            num_microbatches,
            mirror,
            parallel_state.get_data_parallel_group(),
            self.placement.chunks,
        )


def _members(groups: ProcessGroupCollection, names: Sequence[str]) -> list[Any]:
    """The groups of these names that exist, each once."""
    found = [getattr(groups, name, None) for name in names]
    return list({id(group): group for group in found if group is not None}.values())


def uses_plans(config: Any) -> bool:
    """Whether chunks run through schedule plans: where there is an all-to-all to overlap.

    Without expert parallelism Megatron's plans free tensors that are still in use (an identity all-to-all aliases
    its input), and there is nothing to overlap.
    """
    return bool(config.num_moe_experts) and config.expert_model_parallel_size > 1
