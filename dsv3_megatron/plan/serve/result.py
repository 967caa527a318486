"""Latency and throughput of a serving job, and of the same job without copies of experts or without drafts. Pure."""

from dataclasses import dataclass, replace
from typing import Any

from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.serve.job import ServingJob
from dsv3_megatron.plan.serve.memory import longest_context, max_batch, memory_parts
from dsv3_megatron.plan.serve.time import StepTime, step_time
from dsv3_megatron.specs.deployment import Deployment

__all__ = ["DEFAULT_ACCEPTANCE", "Result", "full", "serve", "variants", "without_copies"]

DEFAULT_ACCEPTANCE = 0.85  # the report's 85–90%, its lower end


@dataclass(frozen=True)
class Result:
    """What a job does.

    Attributes:
        latency_per_token_s: decode: seconds between a request's tokens; prefill: to a request's first.
        tokens_per_s_per_gpu: prefill counts tokens found in the cache too, as providers do.
        max_batch: requests per GPU that its memory holds.
    """

    job: ServingJob
    time: StepTime
    latency_per_token_s: float
    tokens_per_s_per_gpu: float
    max_batch: float
    memory: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For output=json."""
        job = self.job
        return {
            "phase": job.phase,
            "gpu": job.gpu.name,
            "gpus": job.num_gpus,
            "tensor_parallel": job.tp,
            "context": job.context,
            "batch_per_gpu": job.batch,
            "max_batch_per_gpu": self.max_batch,
            "step_s": self.time.total,
            "latency_per_token_s": self.latency_per_token_s,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "tokens_per_s_per_node": self.tokens_per_s_per_gpu * job.gpu.node,
            "bound": self.time.bound,
            "cache_bytes_per_token": job.cache_bytes_per_token,
            "cache_bytes_per_request": job.cache_bytes_per_token * job.context,
            "memory_bytes": self.memory,
            "mtp_acceptance": job.acceptance,
            "redundant_experts": job.deployment.extra_slots,
            "imbalance": job.imbalance,
        }


def serve(job: ServingJob) -> Result:
    """PlanError where a request or the batch does not fit."""
    most, memory = max_batch(job), memory_parts(job)
    if most <= 0:
        used = (sum(memory.values()) - memory["cache"] - memory["activations"]) / 2**30
        raise PlanError(
            f"cluster.gpu={job.gpu.name}: the weights of a GPU and what CUDA takes are {used:.1f} GiB of "
            f"{job.gpu.memory / 2**30:.1f}; use weights=fp8, more GPUs, or ones with more memory"
        )
    longest = longest_context(job)
    if job.context > longest:
        raise PlanError(
            f"context={job.context}: a GPU's cache holds {longest:.0f} tokens of one request; use a shorter context, "
            "cache=fp8, or GPUs with more memory"
        )
    if job.batch > most * (1 + 1e-9):
        raise PlanError(
            f"batch={job.batch:g}: {job.context} tokens of {job.batch:g} requests per GPU do not fit; the most is "
            f"batch={most:.2f}"
        )
    time = step_time(job)
    of_request = time.total if job.phase == "prefill" else time.total / job.tokens_per_pass
    rate = job.batch * job.tokens_per_pass / time.total
    return Result(job, time, of_request, rate, most, memory)


def full(job: ServingJob) -> ServingJob:
    """The job with as many requests as fit."""
    return replace(job, batch=max(max_batch(job), 0.0))


def without_copies(job: ServingJob) -> ServingJob:
    """Routed experts once each, on the GPUs that then share them unevenly."""
    shared = job.deployment.shared_as_routed
    deployment = Deployment(0, False, True, job.deployment.microbatches)
    imbalance = max(job.imbalance, LOAD_IMBALANCE)
    changed = replace(job, deployment=deployment, imbalance=imbalance)
    if shared or changed.sizes.num_moe_experts % job.num_gpus:
        # As many GPUs as divide the experts: the largest number that is no larger.
        fitting = max(n for n in range(1, job.num_gpus + 1) if changed.sizes.num_moe_experts % n == 0)
        changed = replace(changed, num_gpus=fitting)
    return changed


def variants(job: ServingJob) -> dict[str, ServingJob]:
    """The same with redundancy and drafts on and off, by name; the batch is the job's."""
    found = {}
    for copies in (True, False) if job.deployment.extra_slots else (False,):
        base = job if copies else without_copies(job)
        for drafts in (False, True) if job.phase == "decode" and job.sizes.mtp_num_layers else (False,):
            acceptance = (job.acceptance or DEFAULT_ACCEPTANCE) if drafts else None
            name = f"redundancy {'on' if copies else 'off'}, MTP {'on' if drafts else 'off'}"
            found[name] = replace(base, acceptance=acceptance)
    return found
