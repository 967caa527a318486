"""A step of a job: pipeline by simulation, then gradients, optimizer and parameters."""

from dataclasses import dataclass
from functools import cached_property

from dsv3_megatron.pipeline import Costs, Schedule, Simulation, build_schedule, simulate
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, PlanError
from dsv3_megatron.plan.memory import GIB, RankMemory, plan_memory
from dsv3_megatron.plan.operators import Operators
from dsv3_megatron.plan.parameters import ParameterCounts, held_by
from dsv3_megatron.plan.stage_times import costs

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class Update:
    """Seconds after the last microbatch that nothing hides, on the slowest rank."""

    gradient_reduce: float
    optimizer: float
    parameter_gather: float

    @property
    def seconds(self) -> float:
        return self.gradient_reduce + self.optimizer + self.parameter_gather


@dataclass(frozen=True)
class Plan:
    """What a job is predicted to take.

    Attributes:
        simulation: of the pipeline, in seconds.
        memory: of each pipeline rank.
    """

    job: Job
    gpu: Gpu
    costs: Costs
    simulation: Simulation
    update: Update
    memory: tuple[RankMemory, ...]

    @cached_property
    def step_s(self) -> float:
        return self.simulation.makespan + self.update.seconds

    @property
    def bubble_s(self) -> float:
        """Of the pipeline, mean of its ranks."""
        return sum(self.simulation.bubble) / len(self.simulation.bubble)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.job.tokens_per_step / self.step_s / self.job.layout.num_gpus

    def unit_times(self, rank: int) -> dict[str, float]:
        """Mean seconds of each kind of action of a pipeline rank, by `Kind`'s value."""
        times: dict[str, list[float]] = {}
        for event in self.simulation.events:
            if event.rank == rank:
                times.setdefault(event.action.kind.value, []).append(event.end - event.start)
        return {kind: sum(values) / len(values) for kind, values in times.items()}

    def gpu_hours(self, tokens: float) -> float:
        """For a token budget, without restarts."""
        return tokens / self.tokens_per_s_per_gpu / 3600

    def days(self, tokens: float) -> float:
        return tokens / (self.tokens_per_s_per_gpu * self.job.layout.num_gpus) / SECONDS_PER_DAY

    @property
    def memory_gib(self) -> list[float]:
        return [rank.peak / GIB for rank in self.memory]

    @property
    def memory_margin_gib(self) -> float:
        """What the fullest rank leaves of the GPU; negative where it does not fit."""
        return self.gpu.memory / GIB - max(self.memory_gib)

    @property
    def fits(self) -> bool:
        return max(rank.peak for rank in self.memory) <= self.gpu.memory


def schedule_of(job: Job) -> Schedule:
    """The table of the job; PlanError with the schedule's own words where it has none for these sizes."""
    layout = job.layout
    try:
        return build_schedule(layout.schedule, layout.pp, job.num_microbatches, **layout.table_options)
    except ValueError as error:
        raise PlanError(
            f"schedule={layout.schedule}, pipeline_model_parallel_size={layout.pp}, global_batch_size="
            f"{job.global_batch_size} ({job.num_microbatches} microbatches): {error}"
        ) from error


def plan(job: Job, gpu: Gpu, counts: ParameterCounts) -> Plan:
    """Memory, time and bubble of `job` on `gpu`."""
    schedule = schedule_of(job)
    memory = plan_memory(job, counts, schedule, gpu)
    return timed(job, gpu, counts, schedule, memory)


def timed(
    job: Job, gpu: Gpu, counts: ParameterCounts, schedule: Schedule, memory: tuple[RankMemory, ...]
) -> Plan:
    """The plan of a job whose table and memory are known."""
    stage_costs = costs(job, gpu)
    simulation = simulate(schedule, stage_costs)
    return Plan(job, gpu, stage_costs, simulation, update(job, gpu, counts, schedule), memory)


def update(job: Job, gpu: Gpu, counts: ParameterCounts, schedule: Schedule) -> Update:
    """The slowest rank's exposed gradient reduction, AdamW and parameter gather.

    With overlap, all stages of a rank but the one that finishes last reduce their gradients behind computation,
    and all but the one that starts first gather their parameters behind it.
    """
    worst = Update(0, 0, 0)
    for rank in range(schedule.num_ranks):
        stages = tuple(sorted({stage for stage, _ in schedule.stages_of(rank)}))
        one = _update_of_rank(job, gpu, counts, stages)
        if one.seconds > worst.seconds:
            worst = one
    return worst


def _update_of_rank(job: Job, gpu: Gpu, counts: ParameterCounts, stages: tuple[int, ...]) -> Update:
    layout, p, ops = job.layout, job.precision, Operators(job, gpu)
    held = held_by(job, counts, stages)
    groups = (
        (held.rest, layout.dense_shards, layout.dense_shards * layout.tp),
        (held.experts, layout.expert_shards, layout.expert_shards * layout.expert_ranks),
    )

    def communicate(bytes_per_element: float) -> float:
        return sum(ops.collective(n * bytes_per_element, ranks, span) for n, ranks, span in groups)

    reduce, gather = communicate(p.main_gradient), communicate(p.compute)
    states = p.main_gradient + 2 * (p.master + 2 * p.moment) + p.compute  # read, read and written, written
    states += 3 * p.main_gradient  # the gradients' norm reads them, and clipping reads and writes them
    elements = sum(n / (ranks if job.distributed_optimizer else 1) for n, ranks, _ in groups)
    # Whole gradients are zeroed before the step, and divided by the number of ranks before they are reduced.
    whole = 0 if job.software.own_kernels else 3 * p.main_gradient * sum(n for n, _, _ in groups)
    if not job.distributed_optimizer:
        reduce, gather = 2 * reduce, 0
    away = elements * job.offload_optimizer  # AdamW in host memory, gradients there and parameters back
    on_host = away * (states / gpu.host.memory + (p.main_gradient + p.compute) / gpu.host.link)
    return Update(
        reduce / len(stages) if job.overlap_grad_reduce else reduce,
        ops.memory((elements - away) * states + whole) + on_host,
        gather / len(stages) if job.overlap_param_gather else gather,
    )
