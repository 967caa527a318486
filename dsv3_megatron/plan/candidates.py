"""The fastest layouts of a model on a cluster: every candidate is checked, none is tried.

    python -m dsv3_megatron.plan.search model=v3_671b cluster=h800_2048 precision=fp8_dsv3

A candidate is refused when something does not divide, when the schedule has no table for it, or when a rank's memory
is too small; all that without a simulation. Those that are left are simulated in the order of a lower bound of their
step (the busiest rank's work), until no other can be among the best.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.pipeline import Schedule, build_schedule
from dsv3_megatron.pipeline.build import INTERLEAVED, ZIGZAG, zigzag_lower_bound
from dsv3_megatron.pipeline.nominal import nominal_options
from dsv3_megatron.pipeline.placement import paid_extra
from dsv3_megatron.plan.activations import footprint
from dsv3_megatron.plan.buffers import outside
from dsv3_megatron.plan.compare import group_size, place
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, Layout, PlanError
from dsv3_megatron.plan.memory import RECEIVES_AHEAD, plan_memory, resident
from dsv3_megatron.plan.parameters import ParameterCounts, held_by
from dsv3_megatron.plan.profile import RankProfile, profile
from dsv3_megatron.plan.stage_times import costs
from dsv3_megatron.plan.step import Plan, timed

RECOMPUTE = (
    (),
    ("layernorm", "mla_up_proj"),
    ("layernorm", "mla_up_proj", "moe_act"),
)
# (schedule, chunks per rank)
SCHEDULES = (
    *(("1f1b", 1), ("zb1p", 1), ("dualpipe", 1), ("dualpipev", 1)),
    *((INTERLEAVED, 2), (INTERLEAVED, 4), (ZIGZAG, 2), (ZIGZAG, 4)),
)
# Caps of a zigzag, over the nominal one. Of its other choices the table's own search takes the best.
CAPS = (1.0, 1.25)


@dataclass(frozen=True)
class Space:
    """What is varied, by the names of the arguments; each a sequence of values."""

    pipeline_model_parallel_size: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    expert_model_parallel_size: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256)
    tensor_model_parallel_size: tuple[int, ...] = (1, 2, 4)
    context_parallel_size: tuple[int, ...] = (1, 2)
    micro_batch_size: tuple[int, ...] = (1, 2)
    schedule: tuple[tuple[str, int], ...] = SCHEDULES
    zigzag_caps: tuple[float, ...] = CAPS
    recompute_modules: tuple[tuple[str, ...], ...] = RECOMPUTE
    last_stage_extra: tuple[int, ...] = (0, 2, 3)


@dataclass(frozen=True)
class Candidate:
    """One point of the space, and its job."""

    job: Job
    last_stage_extra: int

    def overrides(self) -> list[str]:
        """What the trainer's command line would say."""
        job, layout = self.job, self.job.layout
        words = [
            f"tensor_model_parallel_size={layout.tp}",
            f"context_parallel_size={layout.cp}",
            f"pipeline_model_parallel_size={layout.pp}",
            f"expert_model_parallel_size={layout.ep}",
            f"micro_batch_size={job.micro_batch_size}",
            "pipeline_model_parallel_layout=auto",
        ]
        if layout.num_stages > 1:
            paid = paid_extra(job.sizes.num_layers, layout.num_stages, self.last_stage_extra)
            words.append(f"placement.last_stage_extra={paid}")
        if layout.tp > 1:
            words += ["sequence_parallel=true", "expert_tensor_parallel_size=1"]
        if layout.schedule == INTERLEAVED:
            words += [
                "schedule=1f1b",
                f"num_virtual_stages_per_pipeline_rank={layout.num_model_chunks}",
                f"microbatch_group_size_per_virtual_pipeline_stage={layout.microbatch_group_size}",
            ]
            if layout.ep > 1:
                words.append("overlap_moe_expert_parallel_comm=true")
        else:
            words.append(f"schedule={layout.schedule}")
            if layout.schedule == ZIGZAG:
                words.append(f"pipeline_zigzag_chunks={layout.num_model_chunks}")
            words += [f"pipeline_zigzag_{name}={value:g}" for name, value in layout.zigzag]
        modules = sorted(job.recompute)
        if job.precision.fp8_caches:
            modules = [module for module in modules if module != "moe_act"]  # part of the FP8 recipe
        if modules:
            words += ["recompute_granularity=selective", f"recompute_modules=[{','.join(modules)}]"]
        else:
            words += ["recompute_granularity=null", "recompute_modules=null"]
        return words


@dataclass
class Found:
    """What a search comes to.

    Attributes:
        best: fastest first.
        num_candidates, num_simulated: how many were looked at, and of how many the pipeline was simulated.
        refused: reason to how many candidates, and one of them in words.
    """

    best: list[tuple[Plan, Candidate]] = field(default_factory=list)
    num_candidates: int = 0
    num_simulated: int = 0
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)

    def refuse(self, reason: str, example: str) -> None:
        """Count a candidate under its reason; the first one stands as the example."""
        count, first = self.refused.get(reason, (0, example))
        self.refused[reason] = (count + 1, first)


def search(
    base: Job, gpu: Gpu, counts: Mapping[int, ParameterCounts], space: Space, num_best: int = 10
) -> Found:
    """The `num_best` fastest layouts for the batch, model and precision of `base`.

    Args:
        counts: parameter counts by tensor-parallel size.
    """
    found = Found()
    open_ = [
        (busiest_rank(candidate.job, gpu), candidate)
        for candidate in candidates(base, gpu, counts, space, found)
    ]
    open_.sort(key=lambda entry: entry[0])
    for bound_s, candidate in open_:
        if len(found.best) >= num_best and bound_s >= found.best[num_best - 1][0].step_s:
            break
        found.num_simulated += 1
        result = whole_plan(candidate.job, gpu, counts)
        if not result.fits:  # of a zigzag's memory only a bound was known before
            found.refuse("memory", f"{max(result.memory_gib):.0f} GiB of {gpu.memory / 2**30:.0f}")
            continue
        if any(_same(result, other) for other, _ in found.best):
            layout = result.job.layout
            example = f"PP{layout.pp} {layout.schedule}{layout.dealt_by}"
            found.refuse("the same as another (its table is)", example)
            continue
        found.best.append((result, candidate))
        found.best.sort(key=lambda entry: entry[0].step_s)
    found.best = found.best[:num_best]
    return found


def _same(one: Plan, other: Plan) -> bool:
    """Zigzags with other options and one table: a cap that nothing reaches."""

    def without_options(job: Job) -> Job:
        return replace(job, layout=replace(job.layout, zigzag=()))

    figures = one.step_s == other.step_s and one.memory_gib == other.memory_gib
    return figures and without_options(one.job) == without_options(other.job)


def whole_plan(job: Job, gpu: Gpu, counts: Mapping[int, ParameterCounts]) -> Plan:
    """The plan of a job whose table may have been built for another already."""
    schedule = _table(*_table_key(job))
    own = counts[job.layout.tp]
    return timed(job, gpu, own, schedule, plan_memory(job, own, schedule, gpu))


def candidates(
    base: Job, gpu: Gpu, counts: Mapping[int, ParameterCounts], space: Space, found: Found
) -> Iterator[Candidate]:
    """Those that divide, have a table and fit; the others are counted in `found`."""
    seen: set[Job] = set()
    points = itertools.product(
        space.tensor_model_parallel_size,
        space.context_parallel_size,
        space.pipeline_model_parallel_size,
        space.expert_model_parallel_size,
        [
            (name, chunks, cap)
            for name, chunks in space.schedule
            for cap in (space.zigzag_caps if name == ZIGZAG else (1.0,))
        ],
        space.micro_batch_size,
        space.last_stage_extra,
        space.recompute_modules,
    )
    refused_shapes: dict[tuple, tuple[str, str]] = {}
    for tp, cp, pp, ep, (schedule, chunks, cap), micro, extra, modules in points:
        found.num_candidates += 1
        shape = (tp, cp, pp, ep, schedule, chunks, cap, micro, extra)
        if shape in refused_shapes:
            found.refuse(*refused_shapes[shape])
            continue
        words = f"TP{tp} CP{cp} PP{pp} EP{ep} {schedule} micro {micro}"
        try:
            job = _job(base, tp, cp, pp, ep, schedule, chunks, cap, micro, extra, modules)
        except _Impossible as error:
            refused_shapes[shape] = (error.reason, f"{words}: {error}")
            found.refuse(*refused_shapes[shape])
            continue
        if job in seen:
            found.refuse("the same as another (placement makes no difference)", words)
            continue
        seen.add(job)
        least = least_memory if schedule == ZIGZAG else peak_memory
        peak = least(job, gpu, counts[tp])
        if peak > gpu.memory:
            recompute = ",".join(modules) or "nothing"
            found.refuse(
                "memory",
                f"{words}, recompute {recompute}: {peak / 2**30:.0f} GiB of {gpu.memory / 2**30:.0f}",
            )
            continue
        yield Candidate(job, extra)


class _Impossible(Exception):
    """A point of the space that is no job."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def _job(
    base: Job,
    tp: int,
    cp: int,
    pp: int,
    ep: int,
    schedule: str,
    chunks: int,
    cap: float,
    micro: int,
    extra: int,
    modules: tuple[str, ...],
) -> Job:
    s, num_gpus = base.sizes, base.layout.num_gpus
    ranks = tp * cp * pp
    if num_gpus % ranks or num_gpus % (pp * ep):
        raise _Impossible("does not divide the GPUs", f"{num_gpus} GPUs")
    if (num_gpus // pp) % ep or s.num_moe_experts % ep:
        raise _Impossible("does not divide the experts", f"{s.num_moe_experts} experts")
    if s.num_attention_heads % tp:
        raise _Impossible("does not divide the heads", f"{s.num_attention_heads} heads")
    if cp > 1 and s.seq_length % (2 * cp):
        raise _Impossible("does not divide the sequence", f"{s.seq_length} tokens")
    if pp == 1 and schedule != "1f1b":
        raise _Impossible("one pipeline rank has no schedule", "use schedule=1f1b with PP1")
    layout = Layout(num_gpus=num_gpus, tp=tp, pp=pp, cp=cp, ep=ep, schedule=schedule, num_model_chunks=chunks)
    if schedule == ZIGZAG and cap != 1.0:
        nominal = nominal_options(pp, chunks)["memory_cap"]
        layout = replace(layout, zigzag=(("memory_cap", round(nominal * cap, 1)),))
    if base.global_batch_size % (micro * layout.dp):
        raise _Impossible("does not divide the batch", f"{base.global_batch_size} sequences, DP{layout.dp}")
    if schedule == INTERLEAVED:
        num_microbatches = base.global_batch_size // (micro * layout.dp)
        layout = replace(layout, microbatch_group_size=group_size(pp, num_microbatches))
    try:
        stages = place(base, layout.num_stages, extra)
    except RefusedArgument as error:
        raise _Impossible("too many stages", str(error)) from None
    always = {"moe_act"} if base.precision.fp8_caches else set()
    job = replace(
        base,
        layout=layout,
        stages=stages,
        micro_batch_size=micro,
        recompute=frozenset(always.union(modules)),
    )
    if schedule == ZIGZAG:
        return job  # there is always one, and it is dealt only for those that may be among the best
    try:
        _profile(*_table_key(job))
    except PlanError as error:
        raise _Impossible("the schedule has no table", str(error)) from None
    return job


_Key = tuple[str, int, int, tuple[tuple[str, Any], ...]]


def _table_key(job: Job) -> _Key:
    layout = job.layout
    return layout.schedule, layout.pp, job.num_microbatches, tuple(layout.table_options.items())


@lru_cache(maxsize=256)
def _table(schedule: str, pp: int, num_microbatches: int, options: tuple[tuple[str, Any], ...]) -> Schedule:
    try:
        return build_schedule(schedule, pp, num_microbatches, **dict(options))
    except ValueError as error:
        raise PlanError(str(error)) from error


@lru_cache(maxsize=1024)
def _profile(
    schedule: str, pp: int, num_microbatches: int, options: tuple[tuple[str, Any], ...]
) -> tuple[RankProfile, ...]:
    return profile(_table(schedule, pp, num_microbatches, options))


def peak_memory(job: Job, gpu: Gpu, counts: ParameterCounts) -> float:
    """Bytes of the fullest rank; what `plan_memory` finds, by sums."""
    known = {stage: footprint(job, stage) for stage in set(job.stages)}
    footprints = [known[stage] for stage in job.stages]
    message = job.precision.compute * job.tokens / job.layout.tp * job.sizes.hidden_size
    peak, seen = 0.0, set()
    for rank in _profile(*_table_key(job)):
        alike = (tuple(job.stages[stage] for stage in rank.stages), rank.moments)
        if alike in seen:
            continue
        seen.add(alike)
        fixed = sum(resident(job, held_by(job, counts, rank.stages)).values())
        fixed += sum(outside(job, gpu, alike[0]).values())
        peak = max(peak, fixed + rank.memory(footprints) + RECEIVES_AHEAD * rank.channels * message)
    return peak


def least_memory(job: Job, gpu: Gpu, counts: ParameterCounts) -> float:
    """Bytes that the fullest rank of a zigzag holds at least, before its table is dealt: in the steady state a stage's
    activations stay for 2(S − s) − 1 slots, and num_ranks microbatches enter in S of them."""
    known = {stage: footprint(job, stage) for stage in set(job.stages)}
    pp, stages = job.layout.pp, job.layout.num_stages
    peak = 0.0
    for rank in range(pp):
        own = [c * pp + (rank if c % 2 == 0 else pp - 1 - rank) for c in range(job.layout.num_model_chunks)]
        fixed = sum(resident(job, held_by(job, counts, tuple(own))).values())
        in_flight = {s: min(job.num_microbatches, pp * (2 * (stages - s) - 1) // stages) for s in own}
        peak = max(peak, fixed + sum(n * known[job.stages[s]].kept for s, n in in_flight.items()))
    return peak + gpu.overhead


def busiest_rank(job: Job, gpu: Gpu) -> float:
    """Seconds of work of the rank that has most, of a zigzag its lower bound: a step cannot be shorter."""
    stage_costs = costs(job, gpu)
    layout = job.layout
    if layout.schedule == ZIGZAG:
        chunks, options = layout.num_model_chunks, layout.table_options
        cap = options["memory_cap"]
        return zigzag_lower_bound(
            layout.pp, job.num_microbatches, chunks, stage_costs, cap, options["deferred"]
        )
    return max(rank.busy(stage_costs, len(job.stages)) for rank in _profile(*_table_key(job)))
