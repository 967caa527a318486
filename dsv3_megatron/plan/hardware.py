"""The hardware table: peaks from data sheets, achieved fractions from a fit (docs/plan.md says of what).

All rates are per GPU, in FLOP/s or bytes/s and one way. The fractions of Hopper are those of DeepSeek's published
trace of training (deepseek-ai/profile-data, `train.json`); the others' are taken over, not measured.
"""

from dataclasses import dataclass, replace

from dsv3_megatron.plan.job import PlanError


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """Share of the peak that kernels reach, and what the trace shows besides. Fitted in `calibration.py`.

    Attributes:
        fp8_gemm, bf16_gemm: matrix products, of the tensor cores' peak of that precision.
        attention_forward, attention_backward: of the BF16 peak, causal work counted.
        hbm, nvlink, ib: bandwidths.
        small_gemm_rows: rows per expert at which a grouped product reaches half of its fraction.
        latency: seconds of an all-to-all or message besides its bytes.
        beside_token, beside_ib: of an all-to-all between nodes that runs beside computation on
            `communication_sms`: seconds per token whatever its bytes, and the fraction of InfiniBand.
        pair_gap: seconds per layer of an overlapped pair in which neither stream works (launches, events).
        communication_sms: taken from computation while a pair runs.
        sustained: speed of the tensor cores in a long run against the short trace (clocks under load).
    """

    fp8_gemm: float = 0.483
    bf16_gemm: float = 0.70
    attention_forward: float = 0.619
    attention_backward: float = 0.501
    hbm: float = 0.80
    nvlink: float = 0.80
    ib: float = 0.95
    small_gemm_rows: float = 64
    latency: float = 0.2e-3
    beside_token: float = 0.617e-6
    beside_ib: float = 0.737
    pair_gap: float = 0.885e-3
    communication_sms: int = 20
    sustained: float = 0.87


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in its usual system.

    Attributes:
        bf16, fp8: dense peak of the tensor cores, FLOP/s.
        hbm, memory: bytes/s and bytes.
        nvlink, ib: bytes/s.
        nvlink_domain: GPUs that reach each other over NVLink.
        sms: streaming multiprocessors.
        overhead: bytes that are not tensors: CUDA context, NCCL and all-to-all buffers, fragmentation.
    """

    name: str
    bf16: float
    fp8: float
    hbm: float
    memory: float
    nvlink: float
    ib: float = 50e9
    nvlink_domain: int = 8
    sms: int = 132
    overhead: float = 5 * 2**30
    achieved: Achieved = Achieved()


_BF16, _FP8 = 989.5e12, 1979e12  # of Hopper
_80_GB = 81_559 * 2**20  # as the driver reports it
GPUS = {
    gpu.name: gpu
    for gpu in (
        # H800: an H100 with NVLink cut to 400 GB/s both ways (R§3.2.2: 160 GB/s reached of 200).
        Gpu(name="h800", bf16=_BF16, fp8=_FP8, hbm=3.35e12, memory=_80_GB, nvlink=200e9),
        Gpu(name="h100", bf16=_BF16, fp8=_FP8, hbm=3.35e12, memory=_80_GB, nvlink=450e9),
        Gpu(name="h200", bf16=_BF16, fp8=_FP8, hbm=4.8e12, memory=141e9, nvlink=450e9),
        # GB200 NVL72: peaks per GPU as NVIDIA's benchmark recipes state them (2450 and 4900 TFLOP/s).
        Gpu(
            name="gb200",
            bf16=2450e12,
            fp8=4900e12,
            hbm=8e12,
            memory=186 * 2**30,
            nvlink=900e9,
            nvlink_domain=72,
            sms=148,
        ),
    )
}
# Limits for tests: nothing costs anything on the way.
INFINITE = float("inf")


def gpu_named(name: str | None) -> Gpu:
    """An entry of the table; PlanError names the option and the entries."""
    if name not in GPUS:
        raise PlanError(
            f"cluster.gpu={name}: the planner has no such hardware; use cluster.gpu={' or '.join(GPUS)} (a cluster "
            "of GPUs such as cluster=h800_2048 sets it)"
        )
    return GPUS[name]


def without_communication(gpu: Gpu) -> Gpu:
    """The same GPU with free communication: the limit that shows what communication costs."""
    achieved = replace(gpu.achieved, latency=0, beside_token=0)
    return replace(gpu, nvlink=INFINITE, ib=INFINITE, achieved=achieved)
