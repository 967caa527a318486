"""Where the achieved fractions of the hardware table come from: `python -m dsv3_megatron.plan.calibration`.

Two fits, all on DeepSeek's own published numbers and nothing else:

1. From the trace of one overlapped pair: three fractions on its six computing operators (least squares of the
   relative errors), latency and bandwidth beside computation on its four all-to-alls, and the gap per layer from
   the pair's length.
2. From Table 4: the sustained speed of the tensor cores, from W (32 ms, products alone: no communication in it),
   and the load imbalance, from the length of the step. The trace is short and has balanced routing, training has
   not; the all-to-all waits for the fullest rank, so imbalance stands for synchronisation too.

Every other run in the error table is predicted with the same numbers, and balanced routing where the source says so.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.destinations import destinations
from dsv3_megatron.plan.hardware import GPUS, Achieved, Gpu
from dsv3_megatron.plan.job import Job
from dsv3_megatron.plan.operators import Operators
from dsv3_megatron.plan.stage_times import pair
from dsv3_megatron.plan.step import plan

_COMPUTE = ("fp8_gemm", "attention_forward", "attention_backward")


def trace_times(gpu: Gpu) -> dict[str, float]:
    """The model's milliseconds for what the trace shows, on the SMs that compute there, at the trace's clocks."""
    gpu = replace(gpu, watts=2 * gpu.achieved.full_watts)
    ops = Operators(deepseek.JOB, gpu)
    slower = gpu.sms / (gpu.sms - gpu.achieved.communication_sms)
    alone, beside = asdict(ops.moe_layer()), asdict(ops.moe_layer(beside=True))
    times = {name: 1e3 * slower * alone[name] for name in deepseek.TRACE_COMPUTE}
    times |= {name: 1e3 * beside[name] for name in deepseek.TRACE_COMMUNICATION}
    layers = pair(ops.moe_layer(), ops.moe_layer(beside=True), ops.job, gpu)
    return times | {"pair of 4 layers": 4e3 * layers.length}


def fit_trace(gpu: Gpu = GPUS["h800"]) -> Achieved:
    """The first fit."""

    def error(values: list[float]) -> float:
        achieved = replace(gpu.achieved, **_fractions(values))
        times = trace_times(replace(gpu, achieved=achieved))
        return sum((times[name] / ms - 1) ** 2 for name, ms in deepseek.TRACE_COMPUTE.items())

    achieved = replace(gpu.achieved, **_fractions(_minimise(error, [0.5, 0.5, 0.5])))
    achieved = replace(achieved, **_fit_communication(gpu))
    without_gap = trace_times(replace(gpu, achieved=replace(achieved, pair_gap=0)))["pair of 4 layers"]
    return replace(achieved, pair_gap=(deepseek.TRACE_PAIR_OF_4_LAYERS - without_gap) / 4e3)


def _fractions(values: list[float]) -> dict[str, Any]:
    return dict(zip(_COMPUTE, values, strict=True))


def _fit_communication(gpu: Gpu) -> dict[str, Any]:
    """A line through the means of the FP8 and the BF16 all-to-alls: seconds against bytes over InfiniBand."""
    job, ms = deepseek.JOB, deepseek.TRACE_COMMUNICATION
    fp8, bf16 = (ms["dispatch"] + ms["combine_b"]) / 2e3, (ms["combine"] + ms["dispatch_b"]) / 2e3
    nodes = destinations(job, gpu.nvlink_domain).domains
    size = nodes * job.tokens * job.sizes.hidden_size
    rate = size * (2 - (1 + 4 / 128)) / (bf16 - fp8)
    return {"beside_token": (bf16 - 2 * size / rate) / job.tokens, "beside_ib": rate / gpu.ib}


def unit_times(gpu: Gpu, job: Job = deepseek.JOB) -> dict[str, float]:
    """Mean milliseconds of each kind of action on pipeline rank 0."""
    return {kind: 1e3 * s for kind, s in plan(job, gpu, deepseek.COUNTS).unit_times(0).items()}


def fit_sustained(gpu: Gpu = GPUS["h800"]) -> float:
    """The second fit, first half: W is as long as in Table 4."""

    def w(sustained: float) -> float:
        return unit_times(replace(gpu, watts=sustained * gpu.achieved.full_watts))["W"]

    return _bisect(lambda sustained: deepseek.UNIT_TIMES["W"] - w(sustained), 0.5, 1.0)


def fit_imbalance(gpu: Gpu = GPUS["h800"]) -> float:
    """The second fit, second half: the step is as long as published."""

    def step(imbalance: float) -> float:
        return plan(replace(deepseek.JOB, load_imbalance=imbalance), gpu, deepseek.COUNTS).step_s

    return _bisect(lambda imbalance: step(imbalance) - deepseek.STEP_S, 1.0, 2.0)


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is 0."""
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _minimise(function: Callable[[list[float]], float], start: list[float]) -> list[float]:
    """Coordinate descent with shrinking steps; enough for a smooth function of three numbers."""
    point, best, size = list(start), function(start), 0.1
    while size > 1e-4:
        improved = False
        for index in range(len(point)):
            for change in (size, -size):
                trial = point.copy()
                trial[index] += change
                if 0 < trial[index] < 1 and (value := function(trial)) < best:
                    point, best, improved = trial, value, True
        if not improved:
            size /= 2
    return point


def main() -> None:
    gpu = GPUS["h800"]
    fitted = fit_trace(gpu)
    print("fitted on the trace:")
    for name in (*_COMPUTE, "beside_token", "beside_ib", "pair_gap"):
        print(f"  {name:20} {getattr(fitted, name):.4g} (table: {getattr(gpu.achieved, name):.4g})")
    published = deepseek.TRACE_COMPUTE | deepseek.TRACE_COMMUNICATION
    published["pair of 4 layers"] = deepseek.TRACE_PAIR_OF_4_LAYERS
    print("milliseconds, trace and table:")
    for name, ms in trace_times(gpu).items():
        print(f"  {name:20} {published[name]:6.1f} {ms:6.1f} {ms / published[name] - 1:+.0%}")
    print(f"sustained speed fitted on W of Table 4: {fit_sustained(gpu):.3f} (table: {gpu.sustained})")
    for kind, ms in unit_times(gpu).items():
        if kind in deepseek.UNIT_TIMES:
            print(f"  {kind:4} {deepseek.UNIT_TIMES[kind]:6.0f} {ms:6.1f}")
    print(f"load imbalance fitted on the step: {fit_imbalance(gpu):.3f}")


if __name__ == "__main__":
    main()
