"""Runs of Megatron-Bridge and dgxc-benchmarking that were opened once, after the form of the model had been settled.

Commits are of NVIDIA-NeMo/Megatron-Bridge unless said otherwise. Its model TFLOP/s are 260.0 GFLOP a token of
DeepSeek-V3 with MTP at 4096 tokens (its card prints both), its performance scripts force even routing, and set TE's
cross entropy, BF16 gradients and moments and fused routing; numactl binds each process.
"""

from dataclasses import replace

from dsv3_megatron.plan.job import Job, Precision, Software
from dsv3_megatron.plan.published.hopper import H100
from dsv3_megatron.plan.published.nvl72 import GB200_DROP
from dsv3_megatron.plan.published.run import (
    ATTN_ROUTER,
    BF16,
    BF16_GRADIENTS,
    BLOCKWISE,
    MXFP8,
    MXFP8_BRIDGE,
    STAGES_8,
    STAGES_16,
    STAGES_32,
    Half,
    Run,
    megatron,
    rated,
)
from dsv3_megatron.plan.published.sources import BRIDGE, DGXC, PAPER

_FLOPS_PER_TOKEN = 260.0e9
_NVFP4 = Precision(fp8=True, recipe="nvfp4", main_gradient=2)
_ROUTER = frozenset({"router", "preprocess", "shared_experts"})


def _of_tflops(name: str, gpu: str, job: Job, tflops: float, source: str, assumed: str) -> Run:
    """Of Megatron-Bridge's TFLOP per second and GPU."""
    return rated(name, gpu, job, tflops * 1e12 / _FLOPS_PER_TOKEN, "opened", source, assumed)


# --- H100

_NEMO_2508 = megatron(
    num_gpus=1024, pp=8, ep=64, batch=8192, layers=STAGES_16, precision=BF16, recompute={"mla_up_proj", "mlp", "moe"},
    dispatcher="deepep", software=Software(te=(2, 5), router_fusion=False, rope_fusion=False, cross_entropy="te"),
)  # fmt: skip
_H100_HYBRIDEP = megatron(
    num_gpus=1024, tp=2, pp=8, ep=64, batch=16384, layers=STAGES_32, precision=BF16_GRADIENTS,
    recompute={"mla_up_proj", "mlp"}, dispatcher="hybridep", communication_sms=32, overlap_grad_reduce=False,
    software=Software(te=(2, 17), cross_entropy="te"),
)  # fmt: skip
_HOPPER = (
    Run("1024 H100, BF16, PP8 VPP2 EP64, DeepEP, MoE layers recomputed", "h100", _NEMO_2508, 36.189, "opened",
        f"{DGXC}, 25.08.02",
        "NeMo's script read at another commit; MTP; router and rotary embedding not fused, fp32 gradients"),
    Run("1024 H100, BF16, TP2 PP8 VPP4 EP64, HybridEP, GBS 16384", "h100", _H100_HYBRIDEP, 61.75613, "opened",
        "Megatron-Bridge, model_verification_cards/deepseek-v3 at 6d9a87d6a, steps 41 to 50",
        "bound, though train.sh has no numactl"),
    _of_tflops("1024 H100, FP8 blockwise, TP2 PP8 VPP4 EP64, DeepEP, overlap, 25.09", "h100",
               replace(H100, recompute=frozenset({"mla_up_proj", "mlp"}),
                       precision=replace(BLOCKWISE, main_gradient=2), software=Software(te=(2, 7), cross_entropy="te")),
               330, f"{BRIDGE}, 25.09, in parentheses", "blockwise by the page's footnote"),
)  # fmt: skip

# --- B200, B300

_B200_DEEPEP = megatron(
    num_gpus=256, pp=16, ep=16, batch=2048, layers=STAGES_16, precision=MXFP8_BRIDGE, recompute={"mla_up_proj"},
    dispatcher="deepep", software=Software(te=(2, 11), cross_entropy="te"),
)  # fmt: skip
_MCORE_B200 = megatron(
    num_gpus=256, pp=8, ep=32, batch=2048, layers=STAGES_16, precision=MXFP8, recompute={"mla_up_proj", "mlp"},
    dispatcher="deepep", overlap_pairs=True, communication_sms=24,
    software=Software(te=(2, 14), router_padding=True, cross_entropy="te", norm_quantises=True),
)  # fmt: skip
RECIPES = "Megatron-LM (dev) examples/moe_recipes at e5ad09802d, median TFLOP/s/GPU"
MCORE_FLOPS_PER_TOKEN = 259.985e9  # `num_floating_point_operations` there, of DeepSeek-V3 with MTP


def _mcore(name: str, gpu: str, job: Job, tflops: float, assumed: str) -> Run:
    """Of Megatron-LM's own recipes."""
    return rated(name, gpu, job, tflops * 1e12 / MCORE_FLOPS_PER_TOKEN, "opened", RECIPES, assumed)


def _b300(precision: Precision, *, pp: int, micro: int, vpp: int = 1, graphs: bool, batch: int = 4096) -> Job:
    """EP8, HybridEP, up projections recomputed, no overlap."""
    return megatron(
        num_gpus=256, pp=pp, ep=8, micro=micro, batch=batch, layers={8: STAGES_8, 16: STAGES_16}[pp * vpp],
        precision=precision, recompute={"mla_up_proj"}, dispatcher="hybridep", communication_sms=32,
        software=Software(te=(2, 16), cross_entropy="te", graphs=ATTN_ROUTER if graphs else frozenset()),
    )  # fmt: skip


_3385, _4458 = "Megatron-Bridge #3385, baseline", "Megatron-Bridge #4458"
_V2 = "256 GPUs, variant V2 of the recipe, which drops cuDNN's norms on B300"
_WHOLE = replace(
    _b300(replace(MXFP8_BRIDGE, fp8_attention=True, fp8_head=True), pp=8, vpp=2, micro=1, graphs=False),
    whole_iteration_graph=True,
)
_WHOLE = replace(_WHOLE, layout=replace(_WHOLE.layout, overlap_pairs=True))
_B = (
    _of_tflops("256 B200, MXFP8, PP16 EP16, DeepEP, GBS 2048", "b200", _B200_DEEPEP, 635, "Megatron-Bridge #1869",
               "Transformer Engine 2.11; no graphs"),
    _of_tflops("256 B200, BF16, PP16 EP16, DeepEP, GBS 2048", "b200", replace(_B200_DEEPEP, precision=BF16_GRADIENTS),
               575, "Megatron-Bridge #1869", "as above"),
    _mcore("256 B200, MXFP8, PP8 VPP2 EP32, DeepEP, overlap, GBS 2048", "b200", _MCORE_B200, 776.7,
           "the recipe is the run's; bound"),
    _of_tflops("256 B300, BF16, PP8 EP8, HybridEP", "b300", _b300(BF16_GRADIENTS, pp=8, micro=1, graphs=False), 749.1,
               _3385, _V2),
    _of_tflops("256 B300, BF16, PP8 EP8, HybridEP, two sequences", "b300",
               _b300(BF16_GRADIENTS, pp=8, micro=2, graphs=True), 785.3, f"{_4458}, baseline", _V2),
    _of_tflops("256 B300, BF16, PP8 VPP2 EP8, HybridEP", "b300",
               _b300(BF16_GRADIENTS, pp=8, vpp=2, micro=1, graphs=True), 842.48, _4458, _V2),
    _of_tflops("256 B300, MXFP8, PP8 VPP2 EP8, HybridEP, overlap, one graph", "b300", _WHOLE, 1161.4, _4458, _V2),
    _of_tflops("256 B300, NVFP4, PP16 EP8, HybridEP", "b300", _b300(_NVFP4, pp=16, micro=1, graphs=False), 754.593,
               _3385, _V2),
    _of_tflops("256 B300, NVFP4, PP8 EP8, HybridEP, two sequences", "b300",
               _b300(_NVFP4, pp=8, micro=2, graphs=True), 982.6, f"{_4458}, baseline", _V2),
    _of_tflops("256 B300, NVFP4, PP8 VPP2 EP8, HybridEP, two sequences", "b300",
               _b300(_NVFP4, pp=8, vpp=2, micro=2, graphs=True), 1097.11, _4458, _V2),
    _of_tflops("256 B300, MXFP8, PP16 EP8, HybridEP, GBS 256", "b300",
               _b300(MXFP8_BRIDGE, pp=16, micro=1, graphs=False, batch=256), 307.3, f"{_4458}, baseline",
               "the recipe's proxy of a large scale, on 256 GPUs"),
    _of_tflops("256 B300, MXFP8, PP8 VPP2 EP8, HybridEP, overlap, one graph, GBS 256", "b300",
               replace(_WHOLE, global_batch_size=256), 702, _4458, "the recipe's proxy of a large scale, on 256 GPUs"),
)  # fmt: skip

# --- GB200, GB300

_FIRST = f"{BRIDGE}, 25.11 as it first stood (rows that 00b7660be took out)"


def _first(precision: Precision, recompute: set[str], graphs: frozenset[str], *, gather: bool) -> Job:
    """PP4 VPP4 EP64 of 25.11, with MTP; MXFP8 without overlapped parameter gather, as in the recipe."""
    job = megatron(
        num_gpus=256, pp=4, ep=64, batch=2048, layers=STAGES_16, precision=precision, recompute=recompute,
        dispatcher="hybridep", communication_sms=32, software=Software(te=(2, 9), cross_entropy="te", graphs=graphs),
    )  # fmt: skip
    return job if gather else replace(job, overlap_param_gather=False)


_2602 = megatron(
    num_gpus=256, pp=4, ep=64, batch=4096, layers=STAGES_16, precision=MXFP8_BRIDGE, recompute={"mla_up_proj"},
    dispatcher="hybridep", communication_sms=32,
    software=Software(graphs=ATTN_ROUTER, cross_entropy="te", norm_quantises=True),
)  # fmt: skip
_MCORE_GB = megatron(
    num_gpus=256, pp=4, ep=64, batch=8192, layers=STAGES_16, precision=MXFP8, recompute={"mla_up_proj"},
    dispatcher="hybridep", overlap_pairs=True, communication_sms=32,
    software=Software(te=(2, 16), router_padding=True, cross_entropy="te", norm_quantises=True, graphs=ATTN_ROUTER),
)  # fmt: skip
_GB200_DROP_256 = replace(
    GB200_DROP, global_batch_size=2048, layout=replace(GB200_DROP.layout, num_gpus=256, ep=64)
)
# Kimi-K2: 64 heads, 384 experts in one group, one dense layer, no MTP; Muon, which the planner does not have.
_KIMI = megatron(
    num_gpus=256, pp=4, ep=64, micro=2, batch=4096, layers=STAGES_16, dense=1, mtp=0, experts=384, vocab=163_840,
    precision=Precision(fp8=True, recipe="mxfp8", main_gradient=2, moment=4), recompute={"mla_up_proj"},
    dispatcher="hybridep", communication_sms=32, software=Software(te=(2, 16), cross_entropy="te", norm_quantises=True),
)  # fmt: skip
_KIMI = replace(
    _KIMI,
    overlap_param_gather=False,
    sizes=replace(_KIMI.sizes, num_attention_heads=64),
    moe_router_num_groups=1,
    moe_router_group_topk=1,
)
_APART: Half = "apart"
_GB = (
    Run("256 GB200, BF16, TP2 PP4 EP64, all-to-all, token drop", "gb200", _GB200_DROP_256, 34.194, "opened",
        f"{DGXC}, 25.05.05", "as the run on 128, of the same table"),
    Run("512 GB200, BF16, TP2 PP4 EP64, all-to-all, token drop", "gb200",
        replace(_GB200_DROP_256, global_batch_size=4096, layout=replace(_GB200_DROP_256.layout, num_gpus=512)),
        34.274, "opened", f"{DGXC}, 25.05.05", "as the run on 128, of the same table"),
    rated("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, GBS 2048", "gb200",
          _first(MXFP8_BRIDGE, {"mla_up_proj"}, _ROUTER, gather=False), 3653, "opened", _FIRST, "recipe of v0.2.0"),
    rated("256 GB200, BF16, PP4 VPP4 EP64, HybridEP, GBS 2048", "gb200",
          _first(BF16_GRADIENTS, {"mla_up_proj"}, _ROUTER, gather=True), 3037, "opened", _FIRST, "recipe of v0.2.0"),
    rated("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, up projections recomputed", "gb200", _2602, 4021, "opened",
          f"{BRIDGE}, 26.02.01", "recipe of v0.3.1"),
    _mcore("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, graphs, offload, GBS 8192", "gb200",
           replace(_MCORE_GB, offload_modules=frozenset({"expert_fc1"})), 1127.6,
           "the recipe is the run's; its optimizer states leave after the step and come back before it: left out"),
    rated("256 GB300, MXFP8, PP4 VPP4 EP64, HybridEP, GBS 2048", "gb300",
          _first(MXFP8_BRIDGE, {"moe_act"}, ATTN_ROUTER, gather=False), 3943, "opened", _FIRST, "recipe of v0.2.0"),
    rated("256 GB300, BF16, PP4 VPP4 EP64, HybridEP, GBS 2048", "gb300",
          _first(BF16_GRADIENTS, {"moe_act"}, ATTN_ROUTER, gather=True), 3403, "opened", _FIRST, "recipe of v0.2.0"),
    _mcore("256 GB300, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, graphs, GBS 8192", "gb300",
           replace(_MCORE_GB, recompute=frozenset()), 1357.7, "the recipe is the run's"),
    rated("256 GB300, MXFP8, PP4 VPP4 EP64, HybridEP, overlap, graphs, GBS 8192, 2026-03", "gb300",
          replace(_MCORE_GB, recompute=frozenset(),
                  software=replace(_MCORE_GB.software, te=(2, 9), cross_entropy="native")),
          4730, "opened", f"{PAPER}, tables 11 and 20", "the rest as in Megatron-MoE-ModelZoo 2a2fe04"),
    rated("256 GB300, Kimi-K2, MXFP8, PP4 VPP4 EP64, HybridEP, two sequences", "gb300", _KIMI, 5372, _APART,
          f"{BRIDGE}, 26.06", "Muon, in whose place AdamW is planned"),
)  # fmt: skip
OPENED: tuple[Run, ...] = (*_HOPPER, *_B, *_GB)
