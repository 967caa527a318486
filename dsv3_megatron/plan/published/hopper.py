"""Runs on H100."""

from dataclasses import replace

from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.job import Software
from dsv3_megatron.plan.published.run import (
    BF16,
    BLOCKWISE,
    PAPER_STAGES,
    STAGES_32,
    TENSORWISE,
    Run,
    megatron,
    rated,
)
from dsv3_megatron.plan.published.sources import BRIDGE, DGXC, GOLDEN, PAPER, PROXY_2048_TOKENS

H100 = megatron(
    num_gpus=1024, tp=2, pp=8, ep=64, batch=8192, layers=STAGES_32, precision=BLOCKWISE, overlap_pairs=True,
    recompute={"mla_up_proj", "mlp", "moe_act", "layernorm"}, overlap_grad_reduce=False, dispatcher="deepep",
)  # fmt: skip
NEMO = Software(te=(2, 2), router_fusion=False, rope_fusion=False, cross_entropy="te")
_H100_DROP = megatron(
    num_gpus=1024, tp=2, pp=16, ep=64, batch=8192, layers=[3] + [4] * 14 + [2], precision=BF16, mtp=1, drop=True,
    recompute={"mla_up_proj"}, dispatcher="alltoall", shared_expert_overlap=True, software=NEMO,
)  # fmt: skip
_PROXY_LAYERS = [2] * 7
_PROXY_2048 = megatron(
    num_gpus=64, pp=4, ep=16, batch=256, layers=[*_PROXY_LAYERS, 0], precision=replace(BF16, moment=4), seq=2048,
    recompute=set(), dispatcher="alltoall", software=Software(router_fusion=False),
)  # fmt: skip
HOPPER = (
    rated("1024 H100, FP8 blockwise, TP2 PP8 VPP4 EP64, DeepEP, overlap", "h100",
          replace(H100, stages=PAPER_STAGES), 1412, "judge", PAPER,
          "PP8, as its table 17 and its layout have it (table 20 prints PP4); no gradient-reduce overlap as in "
          "Megatron-Bridge"),
    rated("1024 H100, FP8 tensorwise, TP2 PP8 VPP4 EP64, DeepEP, overlap", "h100",
           replace(H100, recompute=frozenset({"mla_up_proj", "mlp"}), precision=TENSORWISE,
                   software=Software(te=(2, 7), cross_entropy="te")),
           1297, "judge", f"{BRIDGE}, 25.09",
           "scaling per tensor by the page's footnote; overlap, recompute and layers per stage as in the recipe"),
    Run("1024 H100, BF16, TP2 PP16 EP64, all-to-all, token drop", "h100", _H100_DROP, 52.04, "fitted",
        f"{DGXC}, 25.05", "capacity 1 with padding as in NeMo's recipe; layers 3, 4 × 14, 2; MTP; router not fused"),
    Run("512 H100, BF16, TP2 PP8 EP64, all-to-all, token drop", "h100",
        megatron(num_gpus=512, tp=2, pp=8, ep=64, batch=4096, layers=[7] + [8] * 6 + [6], precision=BF16, drop=True,
                 recompute={"mla_up_proj"}, dispatcher="alltoall", shared_expert_overlap=True, software=NEMO),
        48.948, "judge", f"{DGXC}, 25.05", "as on 1024"),
    Run("64 H100, BF16, 14 layers, 64 experts, TP2 PP4 EP16, DeepEP", "h100",
        megatron(num_gpus=64, tp=2, pp=4, ep=16, batch=512, layers=[2] * 6 + [1, 1],
                 precision=replace(BF16, moment=4), recompute=set(), dispatcher="deepep", experts=64, vocab=258_560,
                 load_imbalance=LOAD_IMBALANCE, software=Software(router_fusion=False, cross_entropy="te")),
        12.03, "judge", GOLDEN,
        "64 GPUs; recorded before the test changed to HybridEP, so DeepEP; real text, so DeepSeek's load imbalance; "
        "vocabulary 256,000 padded to 6,464"),
    Run("64 H100, BF16, 14 layers, 2048 tokens, PP4 VPP2 EP16, all-to-all", "h100", _PROXY_2048, 2.50, "judge",
        PROXY_2048_TOKENS, "225.1 TFLOP/s/GPU is 2.50 s; router not fused; layout Ett|(tt|)*6mL; fp32 moments, as is "
        "Megatron's default", 68_704 / 1024),
    Run("64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute", "h100",
        replace(_PROXY_2048, recompute=frozenset({"full"})), 3.044, "judge", PROXY_2048_TOKENS, "as above",
        60_154 / 1024, 68_973 / 1024),
    Run("64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute, overlap", "h100",
        replace(_PROXY_2048, recompute=frozenset({"full"}),
                layout=replace(_PROXY_2048.layout, overlap_pairs=True)), 2.839, "judge", PROXY_2048_TOKENS,
        "CUDA_DEVICE_MAX_CONNECTIONS 32", 60_378 / 1024, 74_803 / 1024),
)  # fmt: skip
