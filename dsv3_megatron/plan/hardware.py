"""The hardware table: peaks from data sheets, achieved fractions from fits (docs/plan.md says of what).

All rates are per GPU, in FLOP/s or bytes/s and one way. The fractions of Hopper are those of DeepSeek's published trace
of training (deepseek-ai/profile-data, `train.json`), those of Blackwell are SimuMax's measured operators on B200 and a
fit; `calibration.py` repeats the fits. Peaks of NVIDIA's GPUs as in its dgxc-benchmarking tables, dense.
"""

from dataclasses import dataclass, replace

from dsv3_megatron.plan.host_time import GRACE, XEON_6776P, XEON_8480C, XEON_8570, Host
from dsv3_megatron.plan.job import PlanError


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """Share of the peak that kernels reach, and what runs show besides. Fitted in `calibration.py`.

    Attributes:
        fp8_gemm, bf16_gemm: matrix products, of the tensor cores' peak of that precision, without reading weights.
        fp4_gemm: of the FP4 peak; not fitted: FP8's.
        attention_forward, attention_backward: of the BF16 peak, causal work counted.
        hbm, nvlink, ib: bandwidths; NVLink of collectives and of DeepEP.
        scores: of HBM's, of kernels that pass over whole matrices of scores, where attention is not fused; fitted on
            the one run of the fitted half that has it.
        permutation: of HBM's, of kernels that order rows; on B200 SimuMax's `permute_fwd`, on Hopper as any other.
        hybridep_nvlink: of HybridEP's kernels.
        deepep_wide: DeepEP's dispatch and combine in an NVLink domain of more than 8, which it was not written for.
        nccl_nvlink: of NCCL's all-to-all; in a rack's domain, one tier of switches, as in one of 8.
        nccl_ib: of NCCL's all-to-all over InfiniBand, between two nodes or on one rail: 46 to 48 GB/s a NIC are what
            NVIDIA expects of NDR (nccl-tests #267, #290).
        nccl_many: the same between eight nodes, across rails, where it falls (NCCL #1531); fitted.
        latency: seconds of an all-to-all or message besides its bytes.
        beside_token, beside_ib: of an all-to-all between domains that runs beside computation on
            `communication_sms`: seconds per token whatever its bytes, and the fraction of InfiniBand.
        pair_gap: seconds per layer of an overlapped pair in which neither stream works (launches, events).
        communication_sms: taken from computation while a pair runs.
        flops_per_clock: of BF16, of one SM: with it the share of exponentials in attention follows.
        ramp: seconds of a kernel besides its bytes, which shows where each expert has one of its own: on B200
            Transformer Engine quantises 512 rows in 8 to 10 us, of which their bytes are 2 to 3 (its #2634).
        tile: rows that one product of the tensor cores works on: of one SM, on Blackwell of two.
        full_watts: power at which the tensor cores would keep the clocks of a short trace; with less they slow down.
    """

    fp8_gemm: float
    bf16_gemm: float
    attention_forward: float
    attention_backward: float
    hbm: float
    permutation: float
    scores: float = 0.22
    nvlink: float = 0.80
    ib: float = 0.95
    hybridep_nvlink: float = 0.69
    deepep_wide: tuple[float, float] = (400 / 900, 190 / 900)
    nccl_nvlink: float = 0.597
    nccl_ib: float = 0.94
    nccl_many: float = 0.65
    latency: float = 0.2e-3
    ramp: float = 5e-6
    beside_token: float = 0.617e-6
    beside_ib: float = 0.737
    pair_gap: float = 0.77e-3
    communication_sms: int = 20
    flops_per_clock: int
    tile: int
    full_watts: float

    @property
    def fp4_gemm(self) -> float:
        return self.fp8_gemm


HOPPER = Achieved(
    fp8_gemm=0.504,
    bf16_gemm=0.70,
    attention_forward=0.584,
    attention_backward=0.4885,
    hbm=0.80,
    permutation=0.80,
    flops_per_clock=4096,
    tile=128,
    full_watts=806,
)
BLACKWELL = Achieved(
    fp8_gemm=0.545,
    bf16_gemm=0.645,
    attention_forward=0.553,
    attention_backward=0.428,
    hbm=0.666,
    permutation=0.501,
    beside_token=0,
    beside_ib=0.95,
    flops_per_clock=8192,
    tile=256,
    full_watts=1333,
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in its usual system.

    Attributes:
        bf16, fp8, fp4: dense peak of the tensor cores, FLOP/s; `fp4` 0 where there is none.
        hbm, memory: bytes/s and bytes.
        nvlink, ib: bytes/s.
        node: GPUs of one machine.
        nvlink_domain: GPUs that reach each other over NVLink, of one machine or of many.
        sms: streaming multiprocessors.
        exponentials: of one SM in a clock.
        watts: power limit.
        host: the machine's processor, which launches kernels.
        overhead: bytes that are not tensors: CUDA context, NCCL buffers, fragmentation.
    """

    name: str
    bf16: float
    fp8: float
    hbm: float
    memory: float
    nvlink: float
    achieved: Achieved
    fp4: float = 0
    ib: float = 50e9
    node: int = 8
    nvlink_domain: int = 8
    sms: int = 132
    exponentials: int = 16
    watts: float = 700
    host: Host = XEON_8570
    overhead: float = 5 * 2**30

    @property
    def sustained(self) -> float:
        """Speed of the tensor cores in a long run against a short trace: clocks follow the power limit."""
        return min(1.0, self.watts / self.achieved.full_watts)


_MIB = 2**20
_HOPPER = {"bf16": 989.5e12, "fp8": 1979e12, "achieved": HOPPER, "host": XEON_8480C}
_BLACKWELL = {"sms": 148, "achieved": BLACKWELL, "hbm": 8e12, "nvlink": 900e9}
_RACK = {"node": 4, "nvlink_domain": 72, "host": GRACE}
_80_GB = 81_559 * _MIB  # as the driver reports it
_B200 = {
    "bf16": 2250e12,
    "fp8": 4500e12,
    "fp4": 9000e12,
    "memory": 183_359 * _MIB,
    "watts": 1000,
    **_BLACKWELL,
}
_GB200 = {
    "watts": 1200,
    "bf16": 2450e12,
    "fp8": 4900e12,
    "fp4": 9800e12,
    "memory": 186 * 2**30,
    **_BLACKWELL,
    **_RACK,
}
# Blackwell Ultra: more memory, faster FP4, twice the InfiniBand, and twice the exponentials (NVIDIA, "Making Softmax
# More Efficient with NVIDIA Blackwell Ultra").
_ULTRA = {"memory": 275_040 * _MIB, "ib": 100e9, "exponentials": 32}
GPUS = {
    gpu.name: gpu
    for gpu in (
        # H800: an H100 with NVLink cut to 400 GB/s both ways (R§3.2.2: 160 GB/s reached of 200).
        Gpu(name="h800", hbm=3.35e12, memory=_80_GB, nvlink=200e9, **_HOPPER),  # type: ignore[arg-type]
        Gpu(name="h100", hbm=3.35e12, memory=_80_GB, nvlink=450e9, **_HOPPER),  # type: ignore[arg-type]
        Gpu(name="h200", hbm=4.8e12, memory=141e9, nvlink=450e9, **_HOPPER),  # type: ignore[arg-type]
        # H20: Hopper with 78 SMs, and memory and links as they were.
        Gpu(
            name="h20",
            bf16=148e12,
            fp8=296e12,
            hbm=4.0e12,
            memory=97_871 * _MIB,
            nvlink=450e9,
            sms=78,
            watts=500,
            achieved=HOPPER,
            host=XEON_8480C,
        ),
        Gpu(name="b200", **_B200),  # type: ignore[arg-type]
        Gpu(name="b300", **(_B200 | _ULTRA | {"fp4": 13_500e12, "watts": 1100, "host": XEON_6776P})),  # type: ignore[arg-type]
        Gpu(name="gb200", **_GB200),  # type: ignore[arg-type]
        Gpu(name="gb300", **(_GB200 | _ULTRA | {"fp4": 14_700e12, "watts": 1400})),  # type: ignore[arg-type]
    )
}
# Limits for tests: nothing costs anything on the way.
INFINITE = float("inf")


def gpu_named(name: str | None, option: str = "cluster.gpu") -> Gpu:
    """An entry of the table; PlanError names the option and the entries."""
    if name not in GPUS:
        sets = " (a cluster of GPUs such as cluster=h800_2048 sets it)" if option == "cluster.gpu" else ""
        raise PlanError(
            f"{option}={name}: the planner has no such hardware; use {option}={' or '.join(GPUS)}{sets}"
        )
    return GPUS[name]


def without_communication(gpu: Gpu) -> Gpu:
    """The same GPU with free communication: the limit that shows what communication costs."""
    achieved = replace(gpu.achieved, latency=0, beside_token=0)
    return replace(gpu, nvlink=INFINITE, ib=INFINITE, achieved=achieved)
