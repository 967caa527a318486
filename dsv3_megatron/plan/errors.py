"""Errors in percent, by published run: written by `python -m dsv3_megatron.studies.planner_error errors`."""

from typing import NamedTuple


class Compared(NamedTuple):
    """Of one run: hardware, dispatcher, precision; predicted step against the published one; its sizes."""

    domain: tuple[str, str, str]
    percent: float
    num_gpus: int
    num_microbatches: int
    hidden_size: int


TIME_PERCENT: dict[str, Compared] = {
    "2048 H800, FP8, PP16 EP64, DeepSeek's own": Compared(
        ("h800", "DeepSeek's own", "dsv3"), -0.2, 2048, 120, 7168
    ),
    "1024 H100, FP8 blockwise, TP2 PP8 VPP4 EP64, DeepEP, overlap": Compared(
        ("h100", "deepep", "blockwise"), 1.0, 1024, 128, 7168
    ),
    "1024 H100, FP8 tensorwise, TP2 PP8 VPP4 EP64, DeepEP, overlap": Compared(
        ("h100", "deepep", "tensorwise"), -2.4, 1024, 128, 7168
    ),
    "1024 H100, BF16, TP2 PP16 EP64, all-to-all, token drop": Compared(
        ("h100", "alltoall", "bf16"), -3.1, 1024, 256, 7168
    ),
    "512 H100, BF16, TP2 PP8 EP64, all-to-all, token drop": Compared(
        ("h100", "alltoall", "bf16"), 2.3, 512, 128, 7168
    ),
    "64 H100, BF16, 14 layers, 64 experts, TP2 PP4 EP16, DeepEP": Compared(
        ("h100", "deepep", "bf16"), -3.3, 64, 64, 7168
    ),
    "64 H100, BF16, 14 layers, 2048 tokens, PP4 VPP2 EP16, all-to-all": Compared(
        ("h100", "alltoall", "bf16"), 6.2, 64, 16, 7168
    ),
    "64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute": Compared(
        ("h100", "alltoall", "bf16"), 6.8, 64, 16, 7168
    ),
    "64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute, overlap": Compared(
        ("h100", "alltoall", "bf16"), -0.3, 64, 16, 7168
    ),
    "8 B200, BF16, 4 layers, PP1 EP8, all-to-all, 4 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -4.6, 8, 4, 7168
    ),
    "8 B200, BF16, 4 layers, PP1 EP8, all-to-all, 8 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -2.4, 8, 8, 7168
    ),
    "8 B200, BF16, 4 layers, PP1 EP8, all-to-all, 32 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -1.7, 8, 32, 7168
    ),
    "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 4 microbatches": Compared(
        ("b200", "alltoall", "bf16"), 1.3, 8, 4, 7168
    ),
    "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 8 microbatches": Compared(
        ("b200", "alltoall", "bf16"), 3.0, 8, 8, 7168
    ),
    "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 32 microbatches": Compared(
        ("b200", "alltoall", "bf16"), 3.5, 8, 32, 7168
    ),
    "256 B200, MXFP8, PP16 EP8, all-to-all, GBS 2048": Compared(
        ("b200", "alltoall", "mxfp8"), -9.5, 256, 128, 7168
    ),
    "256 B200, BF16, PP16 EP8, all-to-all, GBS 2048": Compared(
        ("b200", "alltoall", "bf16"), 1.5, 256, 128, 7168
    ),
    "256 B200, MXFP8, PP16 EP8, HybridEP": Compared(("b200", "hybridep", "mxfp8"), -1.0, 256, 256, 7168),
    "256 B200, MXFP8, PP8 VPP2 EP32, DeepEP, overlap": Compared(
        ("b200", "deepep", "mxfp8"), 10.7, 256, 128, 7168
    ),
    "256 B300, MXFP8, PP16 EP8, HybridEP": Compared(("b300", "hybridep", "mxfp8"), 0.8, 256, 256, 7168),
    "256 B300, MXFP8, PP8 EP8, HybridEP, two sequences": Compared(
        ("b300", "hybridep", "mxfp8"), 8.1, 256, 64, 7168
    ),
    "256 GB200, BF16, PP4 VPP4 EP64, all-to-all, token drop": Compared(
        ("gb200", "alltoall", "bf16"), 5.5, 256, 32, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 1: all-to-all": Compared(
        ("gb200", "alltoall", "mxfp8"), -1.0, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 2: scales allocated at once, faster permutation": Compared(
        ("gb200", "alltoall", "mxfp8"), -1.3, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 3: fused router": Compared(
        ("gb200", "alltoall", "mxfp8"), -2.5, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 4: DeepEP": Compared(
        ("gb200", "deepep", "mxfp8"), 0.1, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 5: up projections kept": Compared(
        ("gb200", "deepep", "mxfp8"), 2.9, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 6: graphs of attention and router": Compared(
        ("gb200", "deepep", "mxfp8"), -4.0, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 7: DeepEP tuned": Compared(
        ("gb200", "deepep", "mxfp8"), 0.1, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 8: processes bound": Compared(
        ("gb200", "deepep", "mxfp8"), 0.7, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 9: scales swizzled at once": Compared(
        ("gb200", "deepep", "mxfp8"), 5.4, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 10: shared expert in a graph": Compared(
        ("gb200", "deepep", "mxfp8"), 9.7, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 11: HybridEP": Compared(
        ("gb200", "hybridep", "mxfp8"), -0.1, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 12: host code": Compared(
        ("gb200", "hybridep", "mxfp8"), 1.3, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 13: norms quantise": Compared(
        ("gb200", "hybridep", "mxfp8"), 2.7, 256, 64, 7168
    ),
    "256 GB200, BF16, PP8 VPP4 EP32, HybridEP": Compared(("gb200", "hybridep", "bf16"), 12.7, 256, 128, 7168),
    "256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, GBS 8192": Compared(
        ("gb200", "hybridep", "mxfp8"), 1.1, 256, 128, 7168
    ),
    "256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP": Compared(("gb200", "hybridep", "mxfp8"), 7.0, 256, 64, 7168),
    "256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, one graph": Compared(
        ("gb200", "hybridep", "mxfp8"), 4.4, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP8 VPP4 EP32, HybridEP, no MTP": Compared(
        ("gb200", "hybridep", "mxfp8"), 3.0, 256, 128, 7168
    ),
    "256 GB200, BF16, PP4 VPP4 EP64, HybridEP, no MTP": Compared(
        ("gb200", "hybridep", "bf16"), 0.3, 256, 64, 7168
    ),
    "256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, overlap, one graph": Compared(
        ("gb300", "hybridep", "mxfp8"), 10.8, 256, 32, 7168
    ),
    "256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, overlap, one graph, GBS 15360": Compared(
        ("gb300", "hybridep", "mxfp8"), 10.7, 256, 120, 7168
    ),
    "256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, two sequences": Compared(
        ("gb300", "hybridep", "mxfp8"), 13.6, 256, 16, 7168
    ),
    "1024 H100, BF16, PP8 VPP2 EP64, DeepEP, MoE layers recomputed": Compared(
        ("h100", "deepep", "bf16"), 7.8, 1024, 64, 7168
    ),
    "1024 H100, BF16, TP2 PP8 VPP4 EP64, HybridEP, GBS 16384": Compared(
        ("h100", "hybridep", "bf16"), 3.4, 1024, 256, 7168
    ),
    "1024 H100, FP8 blockwise, TP2 PP8 VPP4 EP64, DeepEP, overlap, 25.09": Compared(
        ("h100", "deepep", "blockwise"), -4.5, 1024, 128, 7168
    ),
    "256 B200, MXFP8, PP16 EP16, DeepEP, GBS 2048": Compared(
        ("b200", "deepep", "mxfp8"), 1.7, 256, 128, 7168
    ),
    "256 B200, BF16, PP16 EP16, DeepEP, GBS 2048": Compared(("b200", "deepep", "bf16"), 9.6, 256, 128, 7168),
    "256 B200, MXFP8, PP8 VPP2 EP32, DeepEP, overlap, GBS 2048": Compared(
        ("b200", "deepep", "mxfp8"), 4.7, 256, 64, 7168
    ),
    "256 B300, BF16, PP8 EP8, HybridEP": Compared(("b300", "hybridep", "bf16"), 11.7, 256, 128, 7168),
    "256 B300, BF16, PP8 EP8, HybridEP, two sequences": Compared(
        ("b300", "hybridep", "bf16"), 13.4, 256, 64, 7168
    ),
    "256 B300, BF16, PP8 VPP2 EP8, HybridEP": Compared(("b300", "hybridep", "bf16"), 21.5, 256, 128, 7168),
    "256 B300, MXFP8, PP8 VPP2 EP8, HybridEP, overlap, one graph": Compared(
        ("b300", "hybridep", "mxfp8"), 12.1, 256, 128, 7168
    ),
    "256 B300, NVFP4, PP16 EP8, HybridEP": Compared(("b300", "hybridep", "nvfp4"), -20.5, 256, 256, 7168),
    "256 B300, NVFP4, PP8 EP8, HybridEP, two sequences": Compared(
        ("b300", "hybridep", "nvfp4"), -10.6, 256, 64, 7168
    ),
    "256 B300, NVFP4, PP8 VPP2 EP8, HybridEP, two sequences": Compared(
        ("b300", "hybridep", "nvfp4"), -4.9, 256, 64, 7168
    ),
    "256 B300, MXFP8, PP16 EP8, HybridEP, GBS 256": Compared(
        ("b300", "hybridep", "mxfp8"), -27.9, 256, 16, 7168
    ),
    "256 B300, MXFP8, PP8 VPP2 EP8, HybridEP, overlap, one graph, GBS 256": Compared(
        ("b300", "hybridep", "mxfp8"), 15.1, 256, 8, 7168
    ),
    "256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, GBS 2048": Compared(
        ("gb200", "hybridep", "mxfp8"), -3.3, 256, 32, 7168
    ),
    "256 GB200, BF16, PP4 VPP4 EP64, HybridEP, GBS 2048": Compared(
        ("gb200", "hybridep", "bf16"), -1.4, 256, 32, 7168
    ),
    "256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, up projections recomputed": Compared(
        ("gb200", "hybridep", "mxfp8"), 3.5, 256, 64, 7168
    ),
    "256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, graphs, offload, GBS 8192": Compared(
        ("gb200", "hybridep", "mxfp8"), -0.3, 256, 128, 7168
    ),
    "256 GB300, MXFP8, PP4 VPP4 EP64, HybridEP, GBS 2048": Compared(
        ("gb300", "hybridep", "mxfp8"), -7.1, 256, 32, 7168
    ),
    "256 GB300, BF16, PP4 VPP4 EP64, HybridEP, GBS 2048": Compared(
        ("gb300", "hybridep", "bf16"), -1.4, 256, 32, 7168
    ),
    "256 GB300, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, graphs, GBS 8192": Compared(
        ("gb300", "hybridep", "mxfp8"), 6.6, 256, 128, 7168
    ),
    "256 GB300, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, graphs, GBS 8192, 2026-03": Compared(
        ("gb300", "hybridep", "mxfp8"), -1.4, 256, 128, 7168
    ),
    "256 GB300, MXFP8, PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb300", "hybridep", "mxfp8"), 13.1, 256, 240, 7168
    ),
    "512 GB300, MXFP8, PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb300", "hybridep", "mxfp8"), 11.8, 512, 120, 7168
    ),
    "2048 GB300, MXFP8, PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb300", "hybridep", "mxfp8"), 1.4, 2048, 32, 7168
    ),
    "4096 GB300, MXFP8, PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb300", "hybridep", "mxfp8"), 8.2, 4096, 16, 7168
    ),
    "8192 GB300, MXFP8, PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb300", "hybridep", "mxfp8"), 9.0, 8192, 8, 7168
    ),
    "256 GB200, MXFP8, TP2 PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb200", "hybridep", "mxfp8"), -5.2, 256, 480, 7168
    ),
    "512 GB200, MXFP8, TP2 PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb200", "hybridep", "mxfp8"), -7.9, 512, 240, 7168
    ),
    "2048 GB200, MXFP8, TP2 PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb200", "hybridep", "mxfp8"), -19.0, 2048, 60, 7168
    ),
    "4096 GB200, MXFP8, TP2 PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb200", "hybridep", "mxfp8"), -24.8, 4096, 32, 7168
    ),
    "8192 GB200, MXFP8, TP2 PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf": Compared(
        ("gb200", "hybridep", "mxfp8"), -35.9, 8192, 16, 7168
    ),
    "64 H100, BF16, 14 layers, 64 experts, TP2 PP4 EP16, DeepEP, 2025-11": Compared(
        ("h100", "deepep", "bf16"), -2.5, 64, 64, 7168
    ),
    "64 H100, BF16, 14 layers, 64 experts, TP2 PP4 EP16, HybridEP, 2026-06": Compared(
        ("h100", "hybridep", "bf16"), -2.3, 64, 64, 7168
    ),
    "64 GB200, BF16, 14 layers, 64 experts, TP2 PP4 EP16, HybridEP, 2026-02": Compared(
        ("gb200", "hybridep", "bf16"), -17.7, 64, 64, 7168
    ),
    "32 GB200, BF16, 14 layers, 64 experts, TP2 PP2 EP8, HybridEP, four sequences, 2026-04": Compared(
        ("gb200", "hybridep", "bf16"), -3.3, 32, 16, 7168
    ),
    "32 GB200, BF16, 14 layers, 64 experts, TP2 PP2 EP8, HybridEP, four sequences, 2026-06": Compared(
        ("gb200", "hybridep", "bf16"), -3.6, 32, 16, 7168
    ),
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP1 EP8, all-to-all, 4 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -4.6, 8, 4, 5120
    ),
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP1 EP8, all-to-all, 8 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -1.8, 8, 8, 5120
    ),
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP1 EP8, all-to-all, 32 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -6.2, 8, 32, 5120
    ),
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP2 EP4, all-to-all, 4 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -7.5, 8, 4, 5120
    ),
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP2 EP4, all-to-all, 8 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -6.3, 8, 8, 5120
    ),
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP2 EP4, all-to-all, 32 microbatches": Compared(
        ("b200", "alltoall", "bf16"), -3.7, 8, 32, 5120
    ),
    "16 H100, Moonlight, BF16, EP8, HybridEP, overlap, two sequences, GBS 1024": Compared(
        ("h100", "hybridep", "bf16"), 6.9, 16, 32, 2048
    ),
    "16 H100, Moonlight, BF16, EP16, all-to-all, GBS 1024": Compared(
        ("h100", "alltoall", "bf16"), -16.6, 16, 64, 2048
    ),
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, nothing recomputed": Compared(
        ("h100", "alltoall", "bf16"), -61.7, 8, 1, 2048
    ),
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, core_attn recomputed": Compared(
        ("h100", "alltoall", "bf16"), -62.6, 8, 1, 2048
    ),
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, mla_up_proj recomputed": Compared(
        ("h100", "alltoall", "bf16"), -63.0, 8, 1, 2048
    ),
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, mla_up_proj and mlp recomputed": Compared(
        ("h100", "alltoall", "bf16"), -64.1, 8, 1, 2048
    ),
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, moe_act recomputed": Compared(
        ("h100", "alltoall", "bf16"), -62.2, 8, 1, 2048
    ),
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, layernorm and moe_act recomputed": Compared(
        ("h100", "alltoall", "bf16"), -65.2, 8, 1, 2048
    ),
}
# Of the fullest rank's peak: of its tensors, or of the device where that is published and further off.
MEMORY_PERCENT: dict[str, float] = {
    "64 H100, BF16, 14 layers, 2048 tokens, PP4 VPP2 EP16, all-to-all": 1.5,
    "64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute": -6.6,
    "64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute, overlap": -13.9,
    "8 B200, BF16, 4 layers, PP1 EP8, all-to-all, 4 microbatches": -0.8,
    "8 B200, BF16, 4 layers, PP1 EP8, all-to-all, 8 microbatches": -0.8,
    "8 B200, BF16, 4 layers, PP1 EP8, all-to-all, 32 microbatches": -0.8,
    "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 4 microbatches": -0.1,
    "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 8 microbatches": -0.1,
    "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 32 microbatches": -0.1,
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP1 EP8, all-to-all, 4 microbatches": 0.6,
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP1 EP8, all-to-all, 8 microbatches": 0.6,
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP1 EP8, all-to-all, 32 microbatches": 0.6,
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP2 EP4, all-to-all, 4 microbatches": 1.4,
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP2 EP4, all-to-all, 8 microbatches": 1.4,
    "8 B200, BF16, 4 layers of DeepSeek-V2, PP2 EP4, all-to-all, 32 microbatches": 1.4,
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, nothing recomputed": 0.5,
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, core_attn recomputed": 0.5,
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, mla_up_proj recomputed": -0.5,
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, mla_up_proj and mlp recomputed": -0.9,
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, moe_act recomputed": -0.3,
    "8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, layernorm and moe_act recomputed": -1.6,
}
# Planned peaks above what the GPU has, of runs that ran: by so much they are too high, or by more.
RAN_PERCENT: dict[str, float] = {
    "256 GB200, BF16, PP8 VPP4 EP32, HybridEP": 3.4,
    "256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, GBS 8192": 3.1,
    "256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, two sequences": 1.3,
    "256 B300, NVFP4, PP8 VPP2 EP8, HybridEP, two sequences": 3.9,
}
