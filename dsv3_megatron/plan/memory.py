"""Memory of each pipeline rank, from the parameter counts, the activations and the schedule's table."""

from dataclasses import dataclass
from typing import NamedTuple

from dsv3_megatron.pipeline import Kind, Schedule
from dsv3_megatron.pipeline.comms import receives
from dsv3_megatron.plan.activations import Footprint, footprint
from dsv3_megatron.plan.buffers import outside
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job
from dsv3_megatron.plan.parameters import Held, ParameterCounts, held_by

GIB = 2**30
RECEIVES_AHEAD = 2  # of `pipeline.p2p.PipelineP2P`: receives kept posted on each channel


class Moment(NamedTuple):
    """After an action of a rank: bytes that its microbatches hold, and the most during the action."""

    live: float
    peak: float


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank.

    Attributes:
        parts: what adds up to `peak`, by name. Activations, deferred inputs and workspace are those at the peak.
        moments: one per action of the rank's program, without what is resident.
    """

    parts: dict[str, float]
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        """Of `peak` the tensors: what PyTorch calls allocated. NCCL, DeepEP and the CUDA context have the rest."""
        return self.peak - self.parts.get("overhead", 0) - self.parts.get("dispatch buffers", 0)

    @property
    def resident(self) -> float:
        """What is there before the first microbatch."""
        return self.peak - max((moment.peak for moment in self.moments), default=0)


def plan_memory(
    job: Job, counts: ParameterCounts, schedule: Schedule, gpu: Gpu | None = None
) -> tuple[RankMemory, ...]:
    """Every pipeline rank.

    Args:
        schedule: the table of `job`.
        gpu: with what is no tensor there (`buffers.py`); None: without.
    """
    footprints = [footprint(job, stage) for stage in job.stages]
    return tuple(_rank(job, counts, schedule, footprints, rank, gpu) for rank in range(schedule.num_ranks))


def resident(job: Job, held: Held) -> dict[str, float]:
    """Bytes of parameters, gradients and optimizer states of a rank."""
    p = job.precision
    elements = held.experts + held.rest
    state = p.master + 2 * p.moment
    if job.distributed_optimizer:
        optimizer = state * (held.experts / job.layout.expert_shards + held.rest / job.layout.dense_shards)
    else:
        optimizer = state * elements
    optimizer *= 1 - job.offload_optimizer
    parts = {
        "parameters": p.compute * elements,
        "gradients": p.main_gradient * elements,
        "optimizer": optimizer,
    }
    if p.fp8:  # each linear weight in E4M3, as it is and transposed, for the step
        parts["fp8 weights"] = 2 * held.linear if job.transformer_impl != "local" else 0
    return parts


def _rank(
    job: Job,
    counts: ParameterCounts,
    schedule: Schedule,
    footprints: list[Footprint],
    rank: int,
    gpu: Gpu | None,
) -> RankMemory:
    stages = tuple(sorted({stage for stage, _ in schedule.stages_of(rank)}))
    parts = resident(job, held_by(job, counts, stages))
    moments, at_peak = _walk(schedule, footprints, rank)
    parts |= at_peak
    channels = {message.channel for action in schedule.ranks[rank] for message in receives(schedule, action)}
    message = job.precision.compute * job.tokens / job.layout.tp * job.sizes.hidden_size
    parts["messages"] = RECEIVES_AHEAD * len(channels) * message
    if gpu is not None:
        parts |= outside(job, gpu, [job.stages[stage] for stage in stages])
    return RankMemory(parts, tuple(moments))


def _walk(
    schedule: Schedule, footprints: list[Footprint], rank: int
) -> tuple[list[Moment], dict[str, float]]:
    """The rank's program, and what is live at its peak."""
    kept = deferred = 0.0
    highest = -1.0
    at_peak: dict[str, float] = {}
    moments = []
    for action in schedule.ranks[rank]:
        peak = 0.0
        parts = action.parts
        alone = schedule.num_stages == 1 and len(parts) == 2
        if alone:  # layer by layer through the same layers: the forward fills what the backward has left
            parts = parts[::-1]
        for part in parts:
            size = footprints[part.stage]
            # What a pass needs is given with its own microbatch's `kept` in it.
            if part.kind is Kind.F:
                during = (kept + size.kept, deferred, size.forward - size.kept)
                kept += size.kept
            elif part.kind is Kind.W:
                during = (kept, deferred, 0.0)
                deferred -= size.deferred
            else:
                beside = size.layer if alone else 0.0  # the forward is one layer ahead
                during = (kept, deferred, size.backward - size.kept + beside)
                kept -= size.kept
                if part.kind is Kind.B_INPUT:
                    deferred += size.deferred
            peak = max(peak, sum(during), kept + deferred)
            if peak > highest:
                highest = peak
                at_peak = {
                    "activations": during[0],
                    "deferred weight gradients": during[1],
                    "workspace": peak - during[0] - during[1],
                }
        moments.append(Moment(kept + deferred, peak))
    return moments, at_peak
