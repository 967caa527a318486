"""Host time: how many kernels and modules a layer launches, and how long the host takes to.

A layer's launches are counted by reading Megatron and Transformer Engine: kernels one by one, and calls of Transformer
Engine's modules, whose Python costs far more than a launch. What a CUDA graph holds is launched at once. Where the host
takes longer than the GPU, the GPU waits (`stage_times.py`); in the forward of a MoE layer the host waits too, for the
number of tokens of each expert.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from dsv3_megatron.plan.job import Job, Software


class Launches(NamedTuple):
    """Of one part of a layer in one pass.

    Attributes:
        kernels: all that the GPU is given.
        modules: calls of Transformer Engine's modules.
        products: of single experts in FP8: operands that are quantised, and products, each with tensors of its own.
    """

    kernels: float = 0
    modules: float = 0
    products: float = 0

    def __add__(self, other: "Launches") -> "Launches":  # type: ignore[override]
        return Launches(*(one + two for one, two in zip(self, other, strict=True)))

    def times(self, number: float) -> "Launches":
        """So many of them."""
        return Launches(*(number * one for one in self))


@dataclass(frozen=True)
class Host:
    """Seconds on a host; of processes that are bound to the cores and memory beside their GPU.

    Attributes:
        kernel: one kernel, with the few operations of PyTorch around it.
        module: one call of a module of Transformer Engine, besides its kernels; less since 2.11 (`LEAN`).
        product: one operand or product of a single expert in FP8, for which tensors are made one by one.
        graph: a CUDA graph.
        unbound: how much longer everything takes where the scheduler moves processes about.
        link, memory: bytes/s of a GPU to host memory, one way, and of AdamW in it, a GPU's share; stated, not measured.
    """

    kernel: float
    module: float
    product: float
    graph: float = 30e-6
    unbound: float = 1.5
    link: float = 50e9
    memory: float = 40e9

    def seconds(self, launches: Launches, software: Software) -> float:
        """Of so many launches."""
        module = self.module * (1 - _LEANER if software.te >= LEAN else 1)
        time = launches.kernels * self.kernel + launches.modules * module + launches.products * self.product
        return time if software.bound else time * self.unbound

    def slower(self, factor: float, **others: float) -> "Host":
        """The same where all of it takes so many times as long."""
        times = {name: getattr(self, name) * factor for name in ("kernel", "module", "product", "graph")}
        return replace(self, **times, **others)


# Fitted in `calibration_host.py` on the odd steps of Megatron's guide.
GRACE = Host(kernel=15e-6, module=240e-6, product=34e-6, link=200e9, memory=120e9)
# Of DGX H100 (8480C, at most 3.8 GHz), DGX B200 (8570, 4.0 GHz) and DGX B300 (6776P, whose priority cores reach 4.6):
# what the host takes for PyTorch's linear layer on the first and on Grace (Transformer Engine #2053), by their clocks.
_OF_GRACE = 13.48 / 37.08
XEON_8480C, XEON_8570, XEON_6776P = (
    GRACE.slower(_OF_GRACE * 3.8 / clock, link=50e9, memory=40e9) for clock in (3.8, 4.0, 4.6)
)
# Since 2.11 Transformer Engine's modules cost the host less (its #2377 and #2400, then #2439 and #2559): on Grace the
# forward of a BF16 linear layer took 99.66 us where PyTorch's takes 37.08 (#2053, 2025-08), and since nearly the same
# (NVIDIA in #2126, 2026-01). What is gone is the difference; of other processors the same share.
LEAN = (2, 11)
_LEANER = (99.66e-6 - 37.08e-6) / GRACE.module


@dataclass(frozen=True)
class Parts:
    """Launches of a layer's forward and backward: before the tokens are sent, and from then on.

    Attributes:
        first: attention, norms, shared expert, router and what prepares the dispatch; of a dense layer the attention.
        second: dispatch, experts, combine; of a dense layer the MLP.
    """

    first: tuple[Launches, Launches]
    second: tuple[Launches, Launches]


# Kernels of a linear layer: the product; in FP8 also its input's quantisation, and swizzled scales of both operands.
# Transformer Engine before 2.8 fills the scales' padding with zeros in kernels of their own.
def _linear(job: Job, calls: int = 1) -> tuple[Launches, Launches]:
    """Forward and backward of so many linear layers."""
    if not job.precision.fp8:
        return Launches(calls, calls), Launches(2 * calls, calls)
    zeros = 2 if job.software.te < (2, 8) else 0
    swizzles = 2 if job.precision.recipe == "mxfp8" else 0
    forward = 1 + 1 + zeros + swizzles
    backward = 2 + 1 + zeros + 2 * swizzles
    return Launches(calls * forward, calls), Launches(calls * backward, calls)


def _grouped(job: Job) -> tuple[Launches, Launches]:
    """Both grouped products of the local experts: cuBLAS, one product after the other on several streams."""
    n = job.local_experts
    if not job.precision.fp8:
        return Launches(2 * n + 2, 2), Launches(4 * n + 3, 2)
    old, mx = job.software.te < (2, 8), job.precision.recipe == "mxfp8"
    zeros = 2 * n if old else 0
    swizzle = 0 if not mx else 2 * n if job.software.te < (2, 9) else 2
    forward = n + n + zeros + swizzle
    backward = 2 * n + n + zeros + 2 * swizzle
    return Launches(2 * forward + 2, 2, 4 * n), Launches(2 * backward + 3, 2, 6 * n)


def _plus(*parts: tuple[Launches, Launches]) -> tuple[Launches, Launches]:
    forward = backward = Launches()
    for f, b in parts:
        forward, backward = forward + f, backward + b
    return forward, backward


def _graphed(job: Job, part: str, launches: tuple[Launches, Launches]) -> tuple[Launches, Launches]:
    """Nothing but the graph itself, where the part is in one; its launch is counted as a few kernels."""
    return (Launches(3), Launches(3)) if part in job.software.graphs else launches


# Beyond the fused ones. Rotary embedding: cosines, halves, their sums and joins, of queries and of keys (Megatron's
# `rope_utils.py`). Attention: its causal mask, made for each call, and what is around its products (Transformer
# Engine's `UnfusedDotProductAttention`).
_ROPE = (Launches(24), Launches(26))
_UNFUSED = (Launches(18), Launches(8))


def _attention(job: Job) -> tuple[Launches, Launches]:
    """MLA: norms, five projections, rotary embedding, attention, residual; tensor parallelism adds its collectives."""
    software = job.software
    norms = (Launches(2, 1), Launches(2, 1))
    if software.norm_quantises and job.precision.fp8:
        norms = (Launches(0, 1), Launches(1, 1))
    around = (Launches(11, 1), Launches(15, 1))  # splits, rotary embedding, attention, residual
    up = _linear(job, 2)
    parts = [norms, _linear(job, 3), up, around]
    if not software.rope_fusion:
        parts.append(_ROPE)
    if not software.fused_attention:
        parts.append(_UNFUSED)
    if job.layout.tp > 1:
        parts.append((Launches(6), Launches(8)))
    forward, backward = _plus(*parts)
    if "mla_up_proj" in job.recompute:
        backward = backward + up[0] + Launches(6, 2)  # rotary embedding again, and the checkpoint
        backward = backward if software.rope_fusion else backward + _ROPE[0]
    if "core_attn" in job.recompute:
        backward = backward + Launches(6, 2)
        backward = backward if software.fused_attention else backward + _UNFUSED[0]
    if "layernorm" in job.recompute:
        backward = backward + Launches(4, 3)
    return _graphed(job, "attn", (forward, backward))


def _router(job: Job) -> tuple[Launches, Launches]:
    """Scores, groups, choice, balance loss: 72 kernels, or 31 when fused (Megatron's guide)."""
    return _graphed(job, "router", (Launches(31 if job.software.router_fusion else 72, 2), Launches(20, 2)))


def _preprocess(job: Job) -> tuple[Launches, Launches]:
    """What is sent where. DeepEP and HybridEP do it in a kernel: with a fused router 17 kernels are left of both."""
    if job.dispatcher == "alltoall":
        return _graphed(job, "preprocess", (Launches(12, 1), Launches(2)))
    return _graphed(job, "preprocess", (Launches(-14 if job.software.router_fusion else 2), Launches(-4)))


def _moving(job: Job) -> tuple[Launches, Launches]:
    """Permutations, all-to-alls and what belongs to them; tokens per expert are read by the host unless all shapes are
    known."""
    fused = 1 if job.software.permute_fusion else 3
    padding = 3 if job.experts_pad else 0
    if job.layout.etp > 1 and job.dispatcher == "alltoall":  # gathers, and sums of the parts of the outputs
        kernels = 8 + 4 * fused
    else:
        kernels = 4 + 4 * fused if job.dispatcher == "alltoall" else 3 + 2 * fused
    return Launches(kernels + padding, 2), Launches(kernels + padding, 2)


def waits(job: Job) -> bool:
    """Whether the host waits for the GPU within the forward of a MoE layer: for the number of tokens of each expert,
    from which it makes its tensors. With tokens padded to a capacity all shapes are known; the backward has them from
    the forward (Megatron's `token_dispatcher.py`: `cuda_sync_point`, and `drop_and_pad`)."""
    return job.layout.expert_ranks > 1 and job.capacity_factor is None


def parts(job: Job, moe: bool) -> Parts:
    """Of one layer."""
    attention = _attention(job)
    if not moe:
        mlp = _plus(_linear(job, 2), (Launches(3, 1), Launches(4, 1)))
        if "mlp" in job.recompute:
            mlp = (mlp[0], mlp[0] + mlp[1])
        return Parts(attention, _graphed(job, "mlp", mlp))
    shared = _graphed(job, "shared_experts", _plus(_linear(job, 2), (Launches(2, 1), Launches(3, 1))))
    if "shared_experts" in job.recompute:
        shared = (shared[0], shared[0] + shared[1])
    first = _plus(attention, (Launches(2, 1), Launches(2, 1)), shared, _router(job), _preprocess(job))
    second = _plus(_moving(job), _grouped(job))
    if "moe_act" in job.recompute:
        second = (second[0], second[1] + Launches(3, 1))
    if "moe" in job.recompute:
        second = (second[0], second[0] + second[1])
    result = Parts(first, _graphed(job, "moe", second))
    return result
