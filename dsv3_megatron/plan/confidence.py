"""How far a plan may be believed: what like it has been held against a published run, and by how much that was off.

A domain is hardware, dispatcher and precision, at sizes that are near: a quarter to four times the GPUs and the
microbatches of a step, half to twice the model's width. Inside of one the error is the largest of its runs, fitted or
not; outside of all the output says so and why, and the error is the largest of all runs. The errors are those of
`errors.py`, which a test compares with the runs planned anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_megatron.plan.errors import MEMORY_PERCENT, RAN_PERCENT, TIME_PERCENT, Compared
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job
from dsv3_megatron.plan.step import Plan

# DeepSeek's own run, whose step is fitted.
DEEPSEEK = "2048 H800, FP8, PP16 EP64, DeepSeek's own"


class Domain(NamedTuple):
    """What has to be the same for a comparison to say something."""

    gpu: str
    dispatcher: str
    precision: str

    def __str__(self) -> str:
        return f"{self.gpu}, {self.dispatcher}, {self.precision}"


# Of a compared run's numbers, how many times as many (or as few) still count as near.
NEAR = {"num_gpus": 4, "num_microbatches": 4, "hidden_size": 2}
_SAID = {"num_gpus": "GPUs", "num_microbatches": "microbatches", "hidden_size": "hidden size"}


@dataclass(frozen=True)
class Confidence:
    """Of one plan.

    Attributes:
        time_percent, memory_percent: largest error seen, of the step and of the fullest rank's peak.
        memory_range: what a peak was, least and most, of the predicted one.
        domain: whether runs of the plan's own domain were compared.
        compared_with: their names; outside of all domains those on the same hardware.
        unlike: what of the job no compared run has, in words.
    """

    time_percent: float
    memory_percent: float
    domain: bool
    compared_with: tuple[str, ...]
    unlike: tuple[str, ...] = ()
    memory_range: tuple[float, float] = (1.0, 1.0)

    def as_dict(self) -> dict[str, object]:
        """The JSON contract."""
        return {
            "time_percent": self.time_percent,
            "memory_percent": self.memory_percent,
            "domain": self.domain,
            "compared_with": list(self.compared_with),
        }

    def __str__(self) -> str:
        runs = f"{len(self.compared_with)} published run{'s' if len(self.compared_with) != 1 else ''}"
        if self.domain:
            return f"±{self.time_percent:.0f}% of the step, by {runs} of this domain"
        why = f" ({'; '.join(self.unlike)})" if self.unlike else ""
        return f"outside of every domain that was compared{why}: ±{self.time_percent:.0f}% is the largest error of any"


def domain_of(job: Job, gpu: Gpu) -> Domain:
    """Of a job on a GPU."""
    if not job.sizes.num_moe_layers:
        dispatcher = "no experts"
    elif job.dispatcher == "flex":
        dispatcher = "DeepSeek's own" if job.software.own_kernels else job.flex_backend
    else:
        dispatcher = str(job.dispatcher)
    return Domain(gpu.name, dispatcher, job.precision.name)


def sizes_of(job: Job) -> dict[str, int]:
    """What has to be near."""
    return {
        "num_gpus": job.layout.num_gpus,
        "num_microbatches": job.num_microbatches,
        "hidden_size": job.sizes.hidden_size,
    }


def is_near(job: Job, run: Compared) -> bool:
    """Whether a compared run is of the job's size."""
    return all(_times(size, getattr(run, name)) <= NEAR[name] for name, size in sizes_of(job).items())


def _times(one: int, other: int) -> float:
    return max(one / other, other / one)


def confidence(job: Job, gpu: Gpu) -> Confidence:
    """What the errors of `errors.py` say of a plan."""
    unlike = _unlike(job)
    own = domain_of(job, gpu)
    domain = {name: run for name, run in TIME_PERCENT.items() if Domain(*run.domain) == own}
    inside = {name: run for name, run in domain.items() if is_near(job, run)}
    if not domain:
        unlike = (f"{own}: never compared", *unlike)
    elif not inside:
        unlike = (*_far(job, list(domain.values())), *unlike)
    if unlike:
        names = [name for name, run in TIME_PERCENT.items() if run.domain[0] == gpu.name]
        time = _largest([run.percent for run in TIME_PERCENT.values()])
    else:
        names, time = list(inside), _largest([run.percent for run in inside.values()])
    peaks = [MEMORY_PERCENT[name] for name in names if name in MEMORY_PERCENT]
    ran = [RAN_PERCENT[name] for name in names if name in RAN_PERCENT]
    peaks = peaks + ran if peaks else [*MEMORY_PERCENT.values(), *RAN_PERCENT.values()]
    seen = [1 / (1 + percent / 100) for percent in peaks]
    memory_range = min(1.0, *seen), max(1.0, *seen)
    return Confidence(time, _largest(peaks), not unlike, tuple(names), unlike, memory_range)


def _far(job: Job, runs: Sequence[Compared]) -> tuple[str, ...]:
    """Of which sizes its domain's runs were, where the job is of another."""
    found = []
    for name, size in sizes_of(job).items():
        compared = [getattr(run, name) for run in runs]
        if all(_times(size, other) > NEAR[name] for other in compared):
            low, high = min(compared), max(compared)
            of_them = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            found.append(f"{_SAID[name]} {size:,}, where {of_them} were compared")
    return tuple(found) or ("no compared run of its domain is near in GPUs, microbatches and width at once",)


def verdict(plan: Plan) -> str:
    """ "fits", "tight" or "does not fit": tight where the memory model's own error decides."""
    peak, (least, most) = max(rank.peak for rank in plan.memory), confidence(plan.job, plan.gpu).memory_range
    if peak * most <= plan.gpu.memory:
        return "fits"
    return "tight" if peak * least <= plan.gpu.memory else "does not fit"


def _unlike(job: Job) -> tuple[str, ...]:
    """What no compared run has."""
    found = list(job.unplanned)
    if not job.layout.wgrad_apart:
        found.append("overlapped pairs without delay_wgrad_compute")
    if job.offload_optimizer:
        found.append("optimizer in host memory")
    if job.offload_modules:
        found.append("activations in host memory")
    if job.precision.fp4:
        found.append("NVFP4")
    if job.layout.cp > 1:
        found.append("context parallelism")
    if job.layout.etp > 1:
        found.append("experts that ranks share")
    if not job.software.fused_attention:
        found.append("attention that is not fused")
    if job.transformer_impl == "local":
        found.append("the reference backend")
    return tuple(found)


def _largest(errors: Sequence[float]) -> float:
    """In whole percent, upwards."""
    return float(round(max(abs(error) for error in errors) + 0.5))
