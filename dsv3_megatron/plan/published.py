"""Other people's published runs of DeepSeek-V3, as jobs: what the constants are fitted on, and what judges them.

Which is which was written here before anything was fitted: of each domain (hardware, dispatcher, precision) that has
more than one run the named one is fitted, of the thirteen steps of Megatron's guide the odd ones, and every other run
is a judge. `half` says it. Each run names its source, and what the source leaves open and is assumed here.

Routing is forced to be even, or tokens are dropped and padded to a capacity, unless a run says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsv3_megatron.pipeline.build import INTERLEAVED
from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.job import Job, Layout, Precision, Software, Stage
from dsv3_megatron.plan.parameters import ParameterCounts, counts_of_sizes

_PAPER = "arXiv 2603.07685 (Scalable Training of MoE Models with Megatron Core)"
_BRIDGE = "NVIDIA-NeMo/Megatron-Bridge performance summary"
_DGXC = "NVIDIA/dgxc-benchmarking deepseek_v3"
_GUIDE = "Megatron-LM, Optimizing DeepSeek-V3 Training Performance on NVIDIA GB200 NVL72 (2025-11)"
_GOLDEN = "Megatron-LM golden values, deepseekv3_proxy_flex_tp1pp4emp16etp1cp1_release"
_6429 = "Megatron-LM #6311 and #6429"
_SIMUMAX = "SimuMax v1.2, B200 release summary"

Half = Literal["fitted", "judge"]


@dataclass(frozen=True)
class Run:
    """One published result.

    Attributes:
        step_s: seconds of a step, as published or from published tokens or TFLOP per second and GPU.
        half: whether a constant was fitted on it.
        peak_gib: most memory allocated on the fullest rank, where it was published.
        assumed: what the source leaves open.
    """

    name: str
    gpu: str
    job: Job
    step_s: float
    half: Half
    source: str
    assumed: str = ""
    peak_gib: float | None = None

    @property
    def counts(self) -> ParameterCounts:
        """Parameters of its model."""
        return counts_of_sizes(self.job.sizes, self.job.layout.tp)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.job.tokens_per_step / self.step_s / self.job.layout.num_gpus


def stages(layers: Sequence[int], mtp: int, dense: int = 3) -> tuple[Stage, ...]:
    """Stages of so many decoder layers, whose first ones are dense; MTP and head on the last."""
    result, first = [], 0
    for index, count in enumerate(layers):
        of_them = max(0, min(dense - first, count))
        last = index == len(layers) - 1
        result.append(Stage(of_them, count - of_them, mtp if last else 0, embedding=index == 0, head=last))
        first += count
    return tuple(result)


# Layers of each stage: "Et|(tt|)*30mL", "Et*4|(t*4|)*14tmL", and one or two stages of 8 or 16 ranks.
_32_STAGES = [1] + [2] * 30 + [0]
_16_STAGES = [4] * 15 + [1]
_8_STAGES = [8] * 7 + [5]
BF16, MXFP8, BLOCKWISE, TENSORWISE = (
    Precision(),
    Precision(fp8=True, recipe="mxfp8", fp8_parameters=True),
    Precision(fp8=True, recipe="blockwise"),
    Precision(fp8=True, recipe="tensorwise", fp8_parameters=True, main_gradient=2),
)
# BF16 gradients, which the recipes of Megatron-Bridge have.
BF16_GRADIENTS = replace(BF16, main_gradient=2)
MXFP8_BRIDGE = replace(MXFP8, main_gradient=2)
ATTN_ROUTER = frozenset({"attn", "router", "preprocess", "shared_experts"})


def megatron(
    *,
    num_gpus: int,
    pp: int,
    ep: int,
    batch: int,
    layers: Sequence[int],
    recompute: set[str],
    precision: Precision,
    dispatcher: str,
    tp: int = 1,
    micro: int = 1,
    mtp: int = 1,
    dense: int = 3,
    overlap_pairs: bool = False,
    communication_sms: int | None = 20,
    whole_iteration_graph: bool = False,
    shared_expert_overlap: bool = False,
    overlap_grad_reduce: bool = True,
    drop: bool = False,
    load_imbalance: float = 1.0,
    experts: int = 256,
    seq: int = 4096,
    vocab: int = 129_280,
    recompute_layers: int | None = None,
    software: Software | None = None,
) -> Job:
    """A job of Megatron's on DeepSeek-V3's layers; `dispatcher`: "alltoall", "deepep" or "hybridep"."""
    chunks = len(layers) // pp
    total = sum(layers)
    return Job(
        sizes=replace(
            deepseek.SIZES,
            mtp_num_layers=mtp,
            num_layers=total,
            num_moe_layers=total - dense,
            num_moe_experts=experts,
            seq_length=seq,
            padded_vocab_size=vocab,
        ),
        layout=Layout(
            num_gpus=num_gpus,
            tp=tp,
            pp=pp,
            ep=ep,
            schedule=INTERLEAVED if chunks > 1 else "1f1b",
            num_model_chunks=chunks,
            overlap_pairs=overlap_pairs,
        ),
        stages=stages(layers, mtp, dense),
        global_batch_size=batch,
        micro_batch_size=micro,
        precision=precision,
        recompute=frozenset(recompute),
        recompute_layers=recompute_layers,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_grad_reduce,  # Megatron's goes with it
        dispatcher="alltoall" if dispatcher == "alltoall" else "flex",
        flex_backend=dispatcher if dispatcher != "alltoall" else "deepep",
        capacity_factor=1.0 if drop else None,
        load_imbalance=load_imbalance,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        communication_sms=communication_sms,
        whole_iteration_graph=whole_iteration_graph,
        shared_expert_overlap=shared_expert_overlap,
        software=software or Software(cross_entropy="te"),
    )


def _of_rate(job: Job, tokens_per_s_per_gpu: float) -> float:
    """Seconds of a step."""
    return job.tokens_per_step / tokens_per_s_per_gpu / job.layout.num_gpus


def _rated(
    name: str,
    gpu: str,
    job: Job,
    rate: float,
    half: Half,
    source: str,
    assumed: str = "",
    peak: float | None = None,
) -> Run:
    """A run that was published in tokens per second and GPU."""
    return Run(name, gpu, job, _of_rate(job, rate), half, source, assumed, peak)


# --- Hopper

_H100 = megatron(
    num_gpus=1024, tp=2, pp=8, ep=64, batch=8192, layers=_32_STAGES, precision=BLOCKWISE, overlap_pairs=True,
    recompute={"mla_up_proj", "mlp", "moe_act", "layernorm"}, overlap_grad_reduce=False, dispatcher="deepep",
)  # fmt: skip
_NEMO = Software(te=(2, 2), router_fusion=False, rope_fusion=False, cross_entropy="te")
_H100_DROP = megatron(
    num_gpus=1024, tp=2, pp=16, ep=64, batch=8192, layers=[3] + [4] * 14 + [2], precision=BF16, mtp=1, drop=True,
    recompute={"mla_up_proj"}, dispatcher="alltoall", shared_expert_overlap=True, software=_NEMO,
)  # fmt: skip
_PROXY_LAYERS = [2] * 7
_PROXY_2048 = megatron(
    num_gpus=64, pp=4, ep=16, batch=256, layers=[*_PROXY_LAYERS, 0], precision=BF16, seq=2048, recompute=set(),
    dispatcher="alltoall", software=Software(router_fusion=False),
)  # fmt: skip
_HOPPER = (
    _rated("1024 H100, FP8 blockwise, TP2 PP8 VPP4 EP64, DeepEP, overlap", "h100", _H100, 1412, "judge",
           _PAPER, "PP8 (its table 20 prints PP4); layers per stage, no gradient-reduce overlap as in Megatron-Bridge"),
    _rated("1024 H100, FP8 tensorwise, TP2 PP8 VPP4 EP64, DeepEP, overlap", "h100",
           replace(_H100, recompute=frozenset({"mla_up_proj", "mlp"}), precision=TENSORWISE,
                   software=Software(te=(2, 7), cross_entropy="te")),
           1297, "judge", f"{_BRIDGE}, 25.09",
           "scaling per tensor by the page's footnote; overlap, recompute and layers per stage as in the recipe"),
    Run("1024 H100, BF16, TP2 PP16 EP64, all-to-all, token drop", "h100", _H100_DROP, 52.04, "fitted",
        f"{_DGXC}, 25.05", "capacity 1 with padding as in NeMo's recipe; layers 3, 4 × 14, 2; MTP; router not fused"),
    Run("512 H100, BF16, TP2 PP8 EP64, all-to-all, token drop", "h100",
        megatron(num_gpus=512, tp=2, pp=8, ep=64, batch=4096, layers=[7] + [8] * 6 + [6], precision=BF16, drop=True,
                 recompute={"mla_up_proj"}, dispatcher="alltoall", shared_expert_overlap=True, software=_NEMO),
        48.948, "judge", f"{_DGXC}, 25.05", "as on 1024"),
    Run("64 H100, BF16, 14 layers, 64 experts, TP2 PP4 EP16, DeepEP", "h100",
        megatron(num_gpus=64, tp=2, pp=4, ep=16, batch=512, layers=[2] * 6 + [1, 1],
                 precision=replace(BF16, moment=4), recompute=set(), dispatcher="deepep", experts=64, vocab=258_560,
                 load_imbalance=LOAD_IMBALANCE, software=Software(router_fusion=False, cross_entropy="te")),
        12.03, "judge", _GOLDEN,
        "64 GPUs; recorded before the test changed to HybridEP, so DeepEP; real text, so DeepSeek's load imbalance; "
        "vocabulary 256,000 padded to 6,464"),
    Run("64 H100, BF16, 14 layers, 2048 tokens, PP4 VPP2 EP16, all-to-all", "h100", _PROXY_2048, 2.50, "judge", _6429,
        "225.1 TFLOP/s/GPU is 2.50 s; router not fused; layout Ett|(tt|)*6mL", 68_704 / 1024),
    Run("64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute", "h100",
        replace(_PROXY_2048, recompute=frozenset({"full"})), 3.044, "judge", _6429, "as above", 60_154 / 1024),
    Run("64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute, overlap", "h100",
        replace(_PROXY_2048, recompute=frozenset({"full"}),
                layout=replace(_PROXY_2048.layout, overlap_pairs=True)), 2.839, "judge", _6429,
        "CUDA_DEVICE_MAX_CONNECTIONS 32", 60_378 / 1024),
)  # fmt: skip

# --- B200, B300: eight GPUs a node, x86

# Of a job that had another dispatcher.
_ALL_TO_ALL: dict[str, Any] = {"dispatcher": "alltoall", "flex_backend": "deepep", "communication_sms": 20}
_B200 = megatron(
    num_gpus=256, pp=16, ep=8, batch=4096, layers=_16_STAGES, precision=MXFP8_BRIDGE, recompute={"mla_up_proj"},
    dispatcher="hybridep", communication_sms=32,
)  # fmt: skip
_B200_PLAIN = replace(
    _B200, **_ALL_TO_ALL, global_batch_size=2048, shared_expert_overlap=True, software=Software(te=(2, 9), cross_entropy="te")
)
_B300_TWO = megatron(
    num_gpus=256, pp=8, ep=8, micro=2, batch=4096, layers=_8_STAGES, precision=MXFP8_BRIDGE, recompute={"mla_up_proj"},
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
            runs.append(Run(name, "b200", job, ms / 1e3, half, _SIMUMAX, assumed, peak))
    return tuple(runs)


_NVL8 = (
    *_simumax_runs(),
    _rated("256 B200, MXFP8, PP16 EP8, all-to-all, GBS 2048", "b200", _B200_PLAIN, 2139, "fitted",
           f"{_BRIDGE}, 25.11", "all-to-all, recompute of up projections, no graphs, as in the release's recipe"),
    _rated("256 B200, BF16, PP16 EP8, all-to-all, GBS 2048", "b200",
           replace(_B200_PLAIN, precision=BF16_GRADIENTS), 2043, "judge", "Megatron-Bridge #1869",
           "532 TFLOP/s/GPU is 2043 tokens; else as the MXFP8 run"),
    _rated("256 B200, MXFP8, PP16 EP8, HybridEP", "b200", _B200, 2815, "judge", f"{_BRIDGE}, 26.04",
           "no graphs, as in the recipe of v0.4.0"),
    _rated("256 B200, MXFP8, PP8 VPP2 EP32, DeepEP, overlap", "b200",
           megatron(num_gpus=256, pp=8, ep=32, batch=4096, layers=_16_STAGES, precision=MXFP8_BRIDGE,
                    recompute={"mla_up_proj", "mlp"}, dispatcher="deepep", overlap_pairs=True,
                    software=Software(graphs=ATTN_ROUTER, cross_entropy="te")),
           3328, "judge", f"{_BRIDGE}, 26.04.01",
           "overlap, recompute and graphs of attention and router as in the recipe of v0.5.0"),
    _rated("256 B300, MXFP8, PP16 EP8, HybridEP", "b300", _B200, 3131, "judge", f"{_BRIDGE}, 26.04",
           "no graphs, as in the recipe of v0.4.0"),
    _rated("256 B300, MXFP8, PP8 EP8, HybridEP, two sequences", "b300", _B300_TWO, 3541, "judge", f"{_BRIDGE}, 26.06",
           "graphs of attention and router as in the recipe of v0.5.0"),
)  # fmt: skip

# --- GB200, GB300: NVLink over a rack of 72, Grace

_GB200_DROP = megatron(
    num_gpus=128, tp=2, pp=4, ep=32, batch=1024, layers=[15, 16, 16, 14], precision=BF16, drop=True,
    recompute={"core_attn"}, dispatcher="alltoall", shared_expert_overlap=True, software=replace(_NEMO, fused_attention=False),
)  # fmt: skip
_GB200_PP4 = megatron(
    num_gpus=256, pp=4, ep=64, batch=4096, layers=_16_STAGES, precision=MXFP8_BRIDGE, recompute={"mlp"},
    dispatcher="hybridep", communication_sms=32, software=Software(graphs=ATTN_ROUTER, cross_entropy="te"),
)  # fmt: skip
_GB200_PP8 = megatron(
    num_gpus=256, pp=8, ep=32, batch=2048, layers=[1] + [2] * 30 + [0], precision=MXFP8, mtp=0,
    recompute={"mlp", "moe_act"}, dispatcher="hybridep", communication_sms=32,
    software=Software(te=(2, 9), router_padding=True, graphs=ATTN_ROUTER, cross_entropy="te"),
)  # fmt: skip
_WHOLE = megatron(
    num_gpus=256, pp=4, ep=64, batch=4096, layers=_16_STAGES, precision=replace(MXFP8_BRIDGE, fp8_head=True),
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
        _GB200_PP8, recompute=up, **_ALL_TO_ALL,
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
            _rated(name, "gb200", job, tflops * 1e12 / MEGATRON_FLOPS_PER_TOKEN, half, _GUIDE, _OF_STEP)
        )
    return tuple(runs)


# Of DeepSeek-V3 without MTP, as Megatron counts: 1003 TFLOP/s at 4018 tokens/s in the 25.11 summary.
MEGATRON_FLOPS_PER_TOKEN = 1003e12 / 4018
_OF_STEP = "no MTP, as in the guide's layout; Transformer Engine's version from the changes that a step names"
_NVL72 = (
    Run("128 GB200, BF16, TP2 PP4 EP32, all-to-all, token drop", "gb200", _GB200_DROP, 34.229, "fitted",
        f"{_DGXC}, 25.05", "as on H100; layers 15, 16, 16, 14; attention not fused: its "
        "container's cuDNN, 9.8, has none of MLA's head "
        "sizes on Blackwell, and only this recipe recomputes core attention"),
    Run("256 GB200, BF16, PP4 VPP4 EP64, all-to-all, token drop", "gb200",
        megatron(num_gpus=256, pp=4, ep=64, batch=2048, layers=_16_STAGES, precision=BF16_GRADIENTS, drop=True,
                 recompute={"mla_up_proj"}, dispatcher="alltoall", shared_expert_overlap=True,
                 software=Software(te=(2, 7), cross_entropy="te")),
        11.07148, "judge", f"{_DGXC}, 25.10", "token drop and all-to-all, as the 25.09 summary says of GB200; MTP"),
    *_ladder(),
    _rated("256 GB200, BF16, PP8 VPP4 EP32, HybridEP", "gb200",
           replace(_GB200_PP8, precision=BF16, recompute=frozenset({"mlp"}), global_batch_size=4096,
                   stages=stages(_32_STAGES, 1), sizes=deepseek.SIZES),
           3298, "judge", _PAPER, "layers per stage, recompute and graphs as in its MXFP8 run"),
    _rated("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, GBS 8192", "gb200",
           replace(_GB200_PP4, precision=MXFP8, global_batch_size=8192), 4020, "judge", _PAPER,
           "layers per stage, recompute and graphs as in Megatron-MoE-ModelZoo"),
    _rated("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP", "gb200",
           replace(_GB200_PP4, software=replace(_GB200_PP4.software, norm_quantises=True)), 4256, "judge",
           f"{_BRIDGE}, 26.04.01", "recompute, graphs and cuDNN's norms as in the recipe of v0.4.1"),
    _rated("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, one graph", "gb200", _WHOLE, 4912, "fitted",
           f"{_BRIDGE}, 26.08", "recompute, overlap, 32 SMs, one graph and head in FP8 as in the recipe of v0.5.0"),
    _rated("256 GB200, MXFP8, PP8 VPP4 EP32, HybridEP, no MTP", "gb200", replace(_GB200_PP8, global_batch_size=4096,
           precision=MXFP8_BRIDGE, overlap_param_gather=False), 4018, "judge", f"{_BRIDGE}, 25.11",
           "layers per stage, recompute and graphs as in the guide's last step"),
    _rated("256 GB200, BF16, PP4 VPP4 EP64, HybridEP, no MTP", "gb200",
           replace(_GB200_PP4, precision=BF16_GRADIENTS, recompute=frozenset({"mla_up_proj"}),
                   stages=stages(_16_STAGES, 0), sizes=replace(deepseek.SIZES, mtp_num_layers=0),
                   software=Software(te=(2, 9), cross_entropy="te",
                                     graphs=frozenset({"router", "preprocess", "shared_experts"}))),
           3139, "judge", f"{_BRIDGE}, 25.11", "recompute and graphs of the router as in the recipe of v0.2.0"),
    _rated("256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, overlap, one graph", "gb300", _GB300, 6288, "judge",
           f"{_BRIDGE}, 26.08", "no recompute, FP8 attention and head, overlap, one graph as in the recipe of v0.5.0"),
    _rated("256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, overlap, one graph, GBS 15360", "gb300",
           replace(_GB300, global_batch_size=15360), 6422, "judge",
           f"{_BRIDGE}, 26.06", "as above"),
    _rated("256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, two sequences", "gb300",
           replace(_GB300, micro_batch_size=2, recompute=frozenset({"mla_up_proj"}), precision=MXFP8_BRIDGE,
                   layout=replace(_GB300.layout, overlap_pairs=False), whole_iteration_graph=False,
                   software=Software(cross_entropy="te", norm_quantises=True)),
           4992, "judge", f"{_BRIDGE}, 26.04.01", "no overlap, no graphs, cuDNN's norms, as in the recipe of v0.4.1"),
)  # fmt: skip

RUNS: tuple[Run, ...] = (*_HOPPER, *_NVL8, *_NVL72)

# Table 7 of the paper: microseconds of dispatch and combine alone, hidden 7168, 4096 tokens, 256 experts, HybridEP.
# Megatron's BF16 both ways.
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
