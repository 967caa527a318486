"""Other people's published runs of DeepSeek-V3, as jobs: what the error table predicts.

Each names its source, its layout, and what the source does not say and is assumed here. Routing is forced to be
even in all of them (their sources say so), so `load_imbalance` is 1. None of them was fitted. Megatron without FP8
dispatch sends BF16 both ways, and sets no SMs aside: communication takes 20 (DeepEP's default) while it runs.
"""

from dataclasses import dataclass, replace

from dsv3_megatron.pipeline.build import INTERLEAVED
from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.job import Job, Layout, Precision, Stage

_MOE_PAPER = "arXiv 2603.07685 (Scalable Training of MoE Models with Megatron Core), tables 11 and 20"
_BRIDGE = "NVIDIA-NeMo/Megatron-Bridge docs/performance-summary(-archive).md"
_DGXC = "NVIDIA/dgxc-benchmarking deepseek_v3/pretrain/megatron_bridge/README.md"


@dataclass(frozen=True)
class Run:
    """One published result.

    Attributes:
        tokens_per_s_per_gpu: as published, or from the published step.
        assumed: what the source leaves open.
    """

    name: str
    gpu: str
    job: Job
    tokens_per_s_per_gpu: float
    source: str
    assumed: str


def stages(layers: list[int], mtp: int) -> tuple[Stage, ...]:
    """Stages of so many decoder layers of DeepSeek-V3, whose first three are dense; MTP and head on the last."""
    result, first = [], 0
    for index, count in enumerate(layers):
        dense = max(0, min(3 - first, count))
        last = index == len(layers) - 1
        result.append(Stage(dense, count - dense, mtp if last else 0, embedding=index == 0, head=last))
        first += count
    return tuple(result)


_32_STAGES = [1] + [2] * 30 + [0]  # "Et|(tt|)*30mL" of Megatron-Bridge's recipes for 8 ranks of 4 chunks
_16_STAGES = [4] * 15 + [1]


def _megatron(
    *,
    num_gpus: int,
    pp: int,
    ep: int,
    batch: int,
    layers: list[int],
    recompute: set[str],
    tp: int = 1,
    chunks: int = 4,
    fp8: bool = False,
    mtp: int = 1,
    overlap_pairs: bool = False,
    communication_sms: int = 20,
    whole_iteration_graph: bool = False,
    overlap_grad_reduce: bool = True,
) -> Job:
    schedule = INTERLEAVED if chunks > 1 else "1f1b"
    return Job(
        sizes=replace(deepseek.SIZES, mtp_num_layers=mtp),
        layout=Layout(
            num_gpus=num_gpus,
            tp=tp,
            pp=pp,
            ep=ep,
            schedule=schedule,
            num_model_chunks=chunks,
            overlap_pairs=overlap_pairs,
        ),
        stages=stages(layers, mtp),
        global_batch_size=batch,
        precision=Precision(fp8=fp8),
        recompute=frozenset(recompute),
        overlap_grad_reduce=overlap_grad_reduce,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        communication_sms=communication_sms,
        whole_iteration_graph=whole_iteration_graph,
    )


_H100 = _megatron(
    num_gpus=1024, tp=2, pp=8, ep=64, batch=8192, layers=_32_STAGES, fp8=True, overlap_pairs=True,
    recompute={"mla_up_proj", "mlp", "moe_act", "layernorm"}, overlap_grad_reduce=False,
)  # fmt: skip
_GB200_OVERLAP = _megatron(
    num_gpus=256, pp=4, ep=64, batch=4096, layers=_16_STAGES, fp8=True, overlap_pairs=True, communication_sms=32,
    whole_iteration_graph=True, recompute={"mla_up_proj"},
)  # fmt: skip
RUNS = (
    Run("1024 H100, FP8 blockwise, TP2 PP8 VPP4 EP64", "h100", _H100, 1412, _MOE_PAPER,
        "PP8 (its table 20 prints PP4); layers per stage, no gradient-reduce overlap as in Megatron-Bridge's recipe"),
    Run("1024 H100, FP8, TP2 PP8 VPP4 EP64", "h100", replace(_H100, recompute=frozenset({"mla_up_proj", "mlp"})), 1297,
        f"{_BRIDGE}, 25.09", "pairs overlap, recompute and layers per stage as in Megatron-Bridge's recipe"),
    Run("256 GB200, BF16, PP8 VPP4 EP32", "gb200",
        _megatron(num_gpus=256, pp=8, ep=32, batch=4096, layers=_32_STAGES, recompute={"mlp"}),
        3298, _MOE_PAPER, "layers per stage, recompute and no overlap of pairs as in its MXFP8 run"),
    Run("256 GB200, MXFP8, PP4 VPP4 EP64", "gb200",
        _megatron(num_gpus=256, pp=4, ep=64, batch=8192, layers=_16_STAGES, recompute={"mlp"}, fp8=True),
        4020, _MOE_PAPER, "layers per stage"),
    Run("256 GB200, MXFP8, PP4 VPP4 EP64, GBS 4096", "gb200",
        _megatron(num_gpus=256, pp=4, ep=64, batch=4096, layers=_16_STAGES, recompute={"mlp"}, fp8=True),
        4256, f"{_BRIDGE}, 26.04.01", "layers per stage; recompute and no overlap of pairs as in its recipe of v0.4.1"),
    Run("256 GB200, MXFP8, PP4 VPP4 EP64, GBS 4096, overlap", "gb200", _GB200_OVERLAP, 4912, f"{_BRIDGE}, 26.08",
        "recompute, overlap, 32 SMs and one CUDA graph per step as in the recipe of the commit that publishes it "
        "(4ab94dfa, perf_recipes/deepseek/common.py); layers per stage"),
    Run("256 GB200, MXFP8, PP8 VPP4 EP32, no MTP", "gb200",
        _megatron(num_gpus=256, pp=8, ep=32, batch=4096, layers=[2] * 30 + [1, 0], recompute={"mlp"}, fp8=True, mtp=0),
        4018, f"{_BRIDGE}, 25.11", "layers per stage, recompute and no overlap of pairs as in the paper's MXFP8 run"),
    Run("256 GB200, BF16, PP4 VPP4 EP64, no MTP", "gb200",
        _megatron(num_gpus=256, pp=4, ep=64, batch=4096, layers=_16_STAGES, recompute={"mla_up_proj"}, mtp=0),
        3139, f"{_BRIDGE}, 25.11", "layers per stage; no overlap of pairs"),
    Run("256 GB200, BF16, PP4 VPP4 EP64, GBS 2048", "gb200",
        _megatron(num_gpus=256, pp=4, ep=64, batch=2048, layers=_16_STAGES, recompute={"mla_up_proj"}),
        4096 * 2048 / 11.07148 / 256, _DGXC, "with MTP; layers per stage; no overlap of pairs"),
)  # fmt: skip

# Table 7 of the same paper: microseconds of dispatch and combine alone, hidden 7168, 4096 tokens, 256 experts,
# HybridEP. Megatron's BF16 both ways.
ALL_TO_ALL_US = {
    ("h100", 8): (661, 624),
    ("h100", 16): (1485, 1688),
    ("h100", 32): (3064, 3088),
    ("h100", 64): (4626, 4398),
    ("gb200", 8): (391, 353),
    ("gb200", 16): (578, 527),
    ("gb200", 32): (612, 646),
    ("gb200", 64): (675, 744),
}
