"""One measured run corrects the planner: `dsv3 plan … anchor=FILE`, and what to measure: `dsv3 plan … --proxy`.

FILE: `{"plan": [words of dsv3 plan], "step_s": seconds}`, or with `"launch": line` and what `dsv3 plan --launch` takes
beside it (`"gpu": name`). The measured job is planned too; achieved fractions and the host's speed of its hardware are
scaled by one number, with which its plan takes the measured time.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv3_megatron.plan.hardware import Achieved, Gpu
from dsv3_megatron.plan.job import Job, PlanError
from dsv3_megatron.plan.parameters import ParameterCounts
from dsv3_megatron.plan.step import plan

# What is seconds or SMs, no speed.
_NO_SPEED = ("latency", "beside_token", "pair_gap", "communication_sms", "full_watts")
SLOWEST, FASTEST = 0.25, 4.0


@dataclass(frozen=True)
class Measured:
    """The file.

    Attributes:
        words: of `dsv3 plan`, that describe the measured job.
        step_s: seconds of one of its steps.
    """

    words: tuple[str, ...]
    step_s: float


def read(path: Path) -> Measured:
    """PlanError says what the file lacks."""
    wanted = (
        '{"plan": ["model=…", …], "step_s": 1.23}, or {"launch": "torchrun …", "gpu": "h100", "step_s": 1.23}'
    )
    try:
        said: Any = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise PlanError(f"anchor={path}: cannot be read ({error}); use {wanted}") from error
    seconds = said.get("step_s") if isinstance(said, dict) else None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise PlanError(f"anchor={path}: step_s, positive seconds of a step, is not there; use {wanted}")
    if isinstance(said.get("plan"), list):
        return Measured(tuple(map(str, said["plan"])), float(seconds))
    if isinstance(said.get("launch"), str):
        sizes = [f"{name}={value}" for name, value in said.items() if name not in ("launch", "step_s")]
        return Measured(("--launch", said["launch"], *sizes), float(seconds))
    raise PlanError(f"anchor={path}: neither plan nor launch is there; use {wanted}")


def scaled(gpu: Gpu, speed: float) -> Gpu:
    """With all fractions, and the host, so many times as fast."""

    def times(value: Any) -> Any:
        return tuple(part * speed for part in value) if isinstance(value, tuple) else value * speed

    names = [field.name for field in fields(Achieved) if field.name not in _NO_SPEED]
    achieved = replace(gpu.achieved, **{name: times(getattr(gpu.achieved, name)) for name in names})
    host = replace(
        gpu.host, **{name: getattr(gpu.host, name) / speed for name in ("kernel", "module", "graph")}
    )
    return replace(gpu, achieved=achieved, host=host)


def speed_of(job: Job, gpu: Gpu, counts: ParameterCounts, step_s: float) -> float:
    """The number by which a measured job is faster than its plan.

    Raises:
        PlanError: more than four times faster or slower: another job was measured.
    """

    def step(speed: float) -> float:
        return plan(job, scaled(gpu, speed), counts).step_s

    if not step(FASTEST) <= step_s <= step(SLOWEST):
        raise PlanError(
            f"anchor: the measured step of {step_s:g} s is more than {FASTEST:g} times off its plan, "
            f"{step(1.0):.3g} s: another job was measured, or another one is described"
        )
    return _bisect(step, step_s)


def _bisect(falling: Callable[[float], float], wanted: float) -> float:
    low, high = SLOWEST, FASTEST
    while high / low > 1.0005:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if falling(middle) > wanted else (low, middle)
    return (low * high) ** 0.5


def proxy(job: Job, gpu: Gpu) -> tuple[list[str], str]:
    """What to measure before this job: its overrides or options, on one node, and why.

    All of the job's kernels at their sizes: its sequence, microbatch, precision, recompute, tensor parallelism, and as
    many experts per rank; the experts' group is a node's, the pipeline is left out.
    """
    s, layout = job.sizes, job.layout
    ep = min(gpu.node, layout.ep)
    experts = job.local_experts * ep
    dense = min(1, s.num_layers - s.num_moe_layers)
    moe = 3
    words = [
        f"num_layers={dense + moe}",
        f'moe_layer_freq="([0]*{dense}+[1]*{moe})"',
        "mtp_num_layers=0",
        f"num_experts={experts}",
        f"expert_model_parallel_size={ep}",
        "pipeline_model_parallel_size=1",
        "pipeline_model_parallel_layout=null",
        "schedule=1f1b",
        "cluster.nodes=1",
        f"global_batch_size={8 * job.micro_batch_size * max(1, gpu.node // (layout.tp * layout.cp))}",
    ]
    why = (
        f"{dense} dense and {moe} MoE layers on one node of {gpu.node}, {job.local_experts} experts per rank as in the "
        f"job, microbatches of {job.micro_batch_size}, eight per rank: every kernel at the job's size, no pipeline"
    )
    return words, why
