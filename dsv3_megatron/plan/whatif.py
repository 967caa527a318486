"""What the hardware of the report's suggestions (§3.5) would give: `dsv3 plan … whatif=all`.

Each is a limit: what today costs the time is gone, and nothing else changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, PlanError
from dsv3_megatron.plan.parameters import ParameterCounts
from dsv3_megatron.plan.step import plan

# Name: the report's section, and the reason.
REASONS = {
    "communication_coprocessor": "§3.5.1: dispatch and combine take no SM from computation",
    "fp8_accumulation_fp32": "§3.5.2: exact sums; the partial sums still leave the tensor cores for the tiles' scales, "
    "so no time is won",
    "tile_scaling_in_tensor_cores": "§3.5.2: FP8 products reach the share of the peak that BF16 products do, as "
    "nothing leaves the tensor cores for its scales",
    "online_quantization": "§3.5.2: activations are cast while they are read; the MLPs' inputs and output gradients "
    "are not written and read again",
    "transposed_fp8_reads": "§3.5.2: weight gradients read FP8 activations transposed, without quantising them again",
}


@dataclass(frozen=True)
class WhatIf:
    """One suggestion, on the planned job."""

    name: str
    step_s: float
    reason: str


def names_of(asked: Sequence[str]) -> tuple[str, ...]:
    """`all`, or names; PlanError names the ones that there are."""
    if tuple(asked) == ("all",):
        return tuple(REASONS)
    wrong = [name for name in asked if name not in REASONS]
    if wrong or not asked:
        raise PlanError(f"whatif={','.join(wrong)}: no such change; use all, or some of {', '.join(REASONS)}")
    return tuple(asked)


def changed(name: str, job: Job, gpu: Gpu) -> tuple[Job, Gpu]:
    """The job on GPUs that can do this."""
    a = gpu.achieved
    if name == "communication_coprocessor":
        return replace(job, communication_sms=0), gpu
    if name == "tile_scaling_in_tensor_cores":
        scaled = replace(a, fp8_gemm=max(a.fp8_gemm, a.bf16_gemm)) if job.precision.fp8 else a
        return job, replace(gpu, achieved=scaled)
    if name in ("online_quantization", "transposed_fp8_reads"):
        return replace(job, hardware=job.hardware | {name}), gpu
    return job, gpu


_OF_FP8 = tuple(name for name in REASONS if name != "communication_coprocessor")


def reason_of(name: str, job: Job) -> str:
    """The report's, or why the job has nothing of it."""
    if name in _OF_FP8 and not job.precision.fp8:
        return f"the job has no FP8 ({job.precision.name}): nothing changes"
    if name == "communication_coprocessor" and job.layout.expert_ranks == 1:
        return "the job has no dispatch or combine: nothing changes"
    return REASONS[name]


def what_if(asked: Sequence[str], job: Job, gpu: Gpu, counts: ParameterCounts) -> list[WhatIf]:
    """Each suggestion alone; after more than one, all of them together."""
    found = []
    together = job, gpu
    for name in asked:
        one = changed(name, job, gpu)
        together = changed(name, *together)
        found.append(WhatIf(name, plan(*one, counts).step_s, reason_of(name, job)))
    if len(asked) > 1:
        found.append(WhatIf("together", plan(*together, counts).step_s, "all of these"))
    return found


def table(found: Sequence[WhatIf], step_s: float) -> str:
    """For people."""
    lines = ["what if (report §3.5):"]
    lines += [
        f"  {one.name:<29} {one.step_s:8.3f} s {one.step_s / step_s - 1:+6.1%}  {one.reason}" for one in found
    ]
    return "\n".join(lines)
