"""Runs on B200 and B300: eight GPUs a node, x86."""

from dataclasses import replace
from typing import Any

from dsv3_megatron.plan.job import Job, Software
from dsv3_megatron.plan.published.run import (
    ATTN_ROUTER,
    BF16,
    BF16_GRADIENTS,
    MXFP8_BRIDGE,
    STAGES_8,
    STAGES_16,
    Half,
    Run,
    megatron,
    rated,
)
from dsv3_megatron.plan.published.sources import BRIDGE, SIMUMAX

# Of a job that had another dispatcher.
ALL_TO_ALL: dict[str, Any] = {"dispatcher": "alltoall", "flex_backend": "deepep", "communication_sms": 20}
_B200 = megatron(
    num_gpus=256, pp=16, ep=8, batch=4096, layers=STAGES_16, precision=MXFP8_BRIDGE, recompute={"mla_up_proj"},
    dispatcher="hybridep", communication_sms=32,
)  # fmt: skip
_B200_PLAIN = replace(
    _B200,
    **ALL_TO_ALL,
    global_batch_size=2048,
    shared_expert_overlap=True,
    software=Software(te=(2, 9), cross_entropy="te"),
)
_B300_TWO = megatron(
    num_gpus=256, pp=8, ep=8, micro=2, batch=4096, layers=STAGES_8, precision=MXFP8_BRIDGE, recompute={"mla_up_proj"},
    dispatcher="hybridep", communication_sms=32, software=Software(graphs=ATTN_ROUTER, cross_entropy="te"),
)  # fmt: skip


def _simumax(ep: int, pp: int, microbatches: int) -> Job:
    """Four layers, one of them dense, on eight B200."""
    return megatron(
        num_gpus=8, pp=pp, ep=ep, batch=microbatches * (8 // pp), layers=[4] if pp == 1 else [2, 2], precision=BF16,
        recompute=set(), dispatcher="alltoall", mtp=0, dense=1, drop=True, overlap_grad_reduce=False,
        software=Software(te=(2, 11), router_fusion=False, cross_entropy="te"),
    )  # fmt: skip


def _simumax_runs() -> tuple[Run, ...]:
    measured: dict[tuple[int, int], tuple[float, dict[int, float]]] = {
        (8, 1): (104.30, {4: 603.2, 8: 1101.7, 32: 4141.2}),
        (4, 2): (114.00, {4: 452.2, 8: 771.6, 32: 2718.6}),
    }
    assumed = (
        "one dense layer, capacity 1 with padding, fp32 gradients and moments as in its launch script; Transformer "
        "Engine 2.11 and its loss as in its guide to reproduce"
    )
    runs = []
    for (ep, pp), (peak, times) in measured.items():
        for count, ms in times.items():
            job = _simumax(ep, pp, count)
            job = replace(
                job,
                precision=replace(job.precision, moment=4),
                overlap_param_gather=False,
                recompute=frozenset(),
            )
            half: Half = "fitted" if (ep, count) == (8, 8) else "judge"
            name = f"8 B200, BF16, 4 layers, PP{pp} EP{ep}, all-to-all, {count} microbatches"
            runs.append(Run(name, "b200", job, ms / 1e3, half, SIMUMAX, assumed, peak))
    return tuple(runs)


NVL8 = (
    *_simumax_runs(),
    rated("256 B200, MXFP8, PP16 EP8, all-to-all, GBS 2048", "b200", _B200_PLAIN, 2139, "fitted",
           f"{BRIDGE}, 25.11", "all-to-all, recompute of up projections, no graphs, as in the release's recipe"),
    rated("256 B200, BF16, PP16 EP8, all-to-all, GBS 2048", "b200",
           replace(_B200_PLAIN, precision=BF16_GRADIENTS), 2043, "judge", "Megatron-Bridge #1869",
           "532 TFLOP/s/GPU is 2043 tokens; else as the MXFP8 run"),
    rated("256 B200, MXFP8, PP16 EP8, HybridEP", "b200", _B200, 2815, "judge", f"{BRIDGE}, 26.04",
           "no graphs, as in the recipe of v0.4.0"),
    rated("256 B200, MXFP8, PP8 VPP2 EP32, DeepEP, overlap", "b200",
           megatron(num_gpus=256, pp=8, ep=32, batch=4096, layers=STAGES_16, precision=MXFP8_BRIDGE,
                    recompute={"mla_up_proj", "mlp"}, dispatcher="deepep", overlap_pairs=True,
                    software=Software(graphs=ATTN_ROUTER, cross_entropy="te")),
           3328, "judge", f"{BRIDGE}, 26.04.01",
           "overlap, recompute and graphs of attention and router as in the recipe of v0.5.0"),
    rated("256 B300, MXFP8, PP16 EP8, HybridEP", "b300", _B200, 3131, "judge", f"{BRIDGE}, 26.04",
           "no graphs, as in the recipe of v0.4.0"),
    rated("256 B300, MXFP8, PP8 EP8, HybridEP, two sequences", "b300", _B300_TWO, 3541, "judge", f"{BRIDGE}, 26.06",
           "graphs of attention and router as in the recipe of v0.5.0"),
)  # fmt: skip
