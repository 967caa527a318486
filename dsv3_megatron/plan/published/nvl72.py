"""Runs on GB200 and GB300: NVLink over a rack of 72, Grace."""

from dataclasses import replace

from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.job import Software
from dsv3_megatron.plan.published.hopper import NEMO
from dsv3_megatron.plan.published.nvl8 import ALL_TO_ALL
from dsv3_megatron.plan.published.run import (
    ATTN_ROUTER,
    BF16,
    BF16_GRADIENTS,
    MXFP8,
    MXFP8_BRIDGE,
    PAPER_STAGES,
    STAGES_16,
    STAGES_32,
    Half,
    Run,
    megatron,
    rated,
    stages,
)
from dsv3_megatron.plan.published.sources import BRIDGE, DGXC, GUIDE, PAPER

GB200_DROP = megatron(
    num_gpus=128, tp=2, pp=4, ep=32, batch=1024, layers=[15, 16, 16, 14], precision=BF16, drop=True,
    recompute={"core_attn"}, dispatcher="alltoall", shared_expert_overlap=True,
    software=replace(NEMO, fused_attention=False),
)  # fmt: skip
_GB200_PP4 = megatron(
    num_gpus=256, pp=4, ep=64, batch=4096, layers=STAGES_16, precision=MXFP8_BRIDGE, recompute={"mlp"},
    dispatcher="hybridep", communication_sms=32, software=Software(graphs=ATTN_ROUTER, cross_entropy="te"),
)  # fmt: skip
_GB200_PP8 = megatron(
    num_gpus=256, pp=8, ep=32, batch=2048, layers=STAGES_32, precision=MXFP8, mtp=0,
    recompute={"mlp", "moe_act"}, dispatcher="hybridep", communication_sms=32,
    software=Software(te=(2, 9), router_padding=True, graphs=ATTN_ROUTER, cross_entropy="te"),
)  # fmt: skip
_WHOLE = megatron(
    num_gpus=256, pp=4, ep=64, batch=4096, layers=STAGES_16, precision=replace(MXFP8_BRIDGE, fp8_head=True),
    recompute={"mla_up_proj"}, dispatcher="hybridep", overlap_pairs=True, communication_sms=32,
    whole_iteration_graph=True,
    software=Software(norm_quantises=True, cross_entropy="te"),
)  # fmt: skip
_GB300 = replace(
    _WHOLE,
    layout=replace(_WHOLE.layout, pp=2, ep=32, num_model_chunks=8),
    recompute=frozenset(),
    precision=replace(MXFP8_BRIDGE, fp8_head=True, fp8_attention=True),
)


def _ladder() -> tuple[Run, ...]:
    """The thirteen steps of the guide, each with what it changed."""
    up, plain = frozenset({"mlp", "mla_up_proj"}), frozenset({"mlp", "moe_act"})
    first = replace(
        _GB200_PP8, recompute=up, **ALL_TO_ALL,
        software=Software(te=(2, 6), router_fusion=False, router_padding=True, bound=False, cross_entropy="te"),
    )  # fmt: skip
    steps: list[tuple[str, float, dict[str, object], dict[str, object]]] = [
        ("all-to-all", 494.46, {}, {}),
        ("scales allocated at once, faster permutation", 529.55, {}, {"te": (2, 8)}),
        ("fused router", 540.00, {}, {"router_fusion": True}),
        ("DeepEP", 566.07, {"dispatcher": "flex", "flex_backend": "deepep"}, {}),
        ("up projections kept", 610.71, {"recompute": plain}, {}),
        ("graphs of attention and router", 663.27, {},
         {"graphs": frozenset({"attn", "router", "preprocess"})}),
        ("DeepEP tuned", 691.49, {}, {}),
        ("processes bound", 762.12, {}, {"bound": True}),
        ("scales swizzled at once", 797.67, {}, {"te": (2, 9)}),
        ("shared expert in a graph", 829.93, {}, {"graphs": ATTN_ROUTER}),
        ("HybridEP", 943.56, {"flex_backend": "hybridep", "communication_sms": 32}, {}),
        ("host code", 956.21, {}, {}),
        ("norms quantise", 970.01, {}, {"norm_quantises": True}),
    ]  # fmt: skip
    runs, job = [], first
    for number, (what, tflops, change, software) in enumerate(steps, 1):
        job = replace(job, **change, software=replace(job.software, **software))  # type: ignore[arg-type]
        name = f"256 GB200, MXFP8, PP8 VPP4 EP32, step {number}: {what}"
        half: Half = "fitted" if number % 2 else "judge"
        runs.append(
            rated(name, "gb200", job, tflops * 1e12 / MEGATRON_FLOPS_PER_TOKEN, half, GUIDE, _OF_STEP)
        )
    return tuple(runs)


# Of DeepSeek-V3 without MTP, as Megatron counts: 1003 TFLOP/s at 4018 tokens/s in the 25.11 summary.
MEGATRON_FLOPS_PER_TOKEN = 1003e12 / 4018
_OF_STEP = "no MTP, as in the guide's layout; Transformer Engine's version from the changes that a step names"
NVL72 = (
    Run("128 GB200, BF16, TP2 PP4 EP32, all-to-all, token drop", "gb200", GB200_DROP, 34.229, "fitted",
        f"{DGXC}, 25.05", "as on H100; layers 15, 16, 16, 14; attention not fused: its "
        "container's cuDNN, 9.8, has none of MLA's head "
        "sizes on Blackwell, and only this recipe recomputes core attention"),
    Run("256 GB200, BF16, PP4 VPP4 EP64, all-to-all, token drop", "gb200",
        megatron(num_gpus=256, pp=4, ep=64, batch=2048, layers=STAGES_16, precision=BF16_GRADIENTS, drop=True,
                 recompute={"mla_up_proj"}, dispatcher="alltoall", shared_expert_overlap=True,
                 software=Software(te=(2, 7), cross_entropy="te")),
        11.07148, "judge", f"{DGXC}, 25.10", "token drop and all-to-all, as the 25.09 summary says of GB200; MTP"),
    *_ladder(),
    rated("256 GB200, BF16, PP8 VPP4 EP32, HybridEP", "gb200",
           replace(_GB200_PP8, precision=BF16, recompute=frozenset({"mlp"}), global_batch_size=4096,
                   stages=PAPER_STAGES, sizes=deepseek.SIZES,
                   software=replace(_GB200_PP8.software, router_padding=False)),
          3298, "judge", PAPER,
          "MTP, for its 857 TFLOP/s are 260 GFLOP a token; its layout of 32 stages, printed for H100"),
    rated("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, GBS 8192", "gb200",
           replace(_GB200_PP4, precision=MXFP8, global_batch_size=8192), 4020, "judge", PAPER,
           "layers per stage, recompute and graphs as in Megatron-MoE-ModelZoo"),
    rated("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP", "gb200",
           replace(_GB200_PP4, software=replace(_GB200_PP4.software, norm_quantises=True)), 4256, "judge",
           f"{BRIDGE}, 26.04.01", "recompute, graphs and cuDNN's norms as in the recipe of v0.4.1"),
    rated("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, one graph", "gb200", _WHOLE, 4912, "fitted",
           f"{BRIDGE}, 26.08", "recompute, overlap, 32 SMs, one graph and head in FP8 as in the recipe of v0.5.0"),
    rated("256 GB200, MXFP8, PP8 VPP4 EP32, HybridEP, no MTP", "gb200", replace(_GB200_PP8, global_batch_size=4096,
           precision=MXFP8_BRIDGE, overlap_param_gather=False), 4018, "judge", f"{BRIDGE}, 25.11",
           "layers per stage, recompute and graphs as in the guide's last step"),
    rated("256 GB200, BF16, PP4 VPP4 EP64, HybridEP, no MTP", "gb200",
           replace(_GB200_PP4, precision=BF16_GRADIENTS, recompute=frozenset({"mla_up_proj"}),
                   stages=stages(STAGES_16, 0), sizes=replace(deepseek.SIZES, mtp_num_layers=0),
                   software=Software(te=(2, 9), cross_entropy="te",
                                     graphs=frozenset({"router", "preprocess", "shared_experts"}))),
           3139, "judge", f"{BRIDGE}, 25.11", "recompute and graphs of the router as in the recipe of v0.2.0"),
    rated("256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, overlap, one graph", "gb300", _GB300, 6288, "judge",
           f"{BRIDGE}, 26.08", "no recompute, FP8 attention and head, overlap, one graph as in the recipe of v0.5.0"),
    rated("256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, overlap, one graph, GBS 15360", "gb300",
           replace(_GB300, global_batch_size=15360), 6422, "judge",
           f"{BRIDGE}, 26.06", "as above"),
    rated("256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, two sequences", "gb300",
           replace(_GB300, micro_batch_size=2, recompute=frozenset({"mla_up_proj"}), precision=MXFP8_BRIDGE,
                   layout=replace(_GB300.layout, overlap_pairs=False), whole_iteration_graph=False,
                   software=Software(cross_entropy="te", norm_quantises=True)),
           4992, "judge", f"{BRIDGE}, 26.04.01", "no overlap, no graphs, cuDNN's norms, as in the recipe of v0.4.1"),
)  # fmt: skip
