"""Runs of small models: opened once, after the form of the model had been settled.

Moonlight-16B-A3B, DeepSeek-V2's layers on one node, and the proxy of Megatron-LM's release tests, whose golden values
give medians of all iterations after the first hundred.
"""

from dataclasses import replace

from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.job import Job, Software
from dsv3_megatron.plan.published.run import BF16, BF16_GRADIENTS, Run, megatron
from dsv3_megatron.plan.published.sources import SIMUMAX

_FP32_MOMENTS = replace(BF16, moment=4)

# --- The proxy: DeepSeek-V3's widths, 14 layers, 64 experts, real text

_TESTS = "Megatron-LM golden values, deepseekv3_proxy_flex_"
_REAL = "GPUs from the recorded memory and EP × PP; real text, so DeepSeek's load imbalance; vocabulary padded to 6,464"


def _proxy(
    *, num_gpus: int, pp: int, ep: int, micro: int, dispatcher: str, sms: int, software: Software
) -> Job:
    return megatron(
        num_gpus=num_gpus, tp=2, pp=pp, ep=ep, micro=micro, batch=512, experts=64, vocab=258_560,
        layers=[2] * 6 + [1, 1] if pp == 4 else [7, 7], precision=_FP32_MOMENTS, recompute=set(),
        dispatcher=dispatcher, communication_sms=sms, load_imbalance=LOAD_IMBALANCE, software=software,
    )  # fmt: skip


_PLAIN = Software(router_fusion=False, cross_entropy="te")
_RACK = _proxy(
    num_gpus=32, pp=2, ep=8, micro=4, dispatcher="hybridep", sms=16, software=replace(_PLAIN, te=(2, 14), bound=False)
)  # fmt: skip
_PROXIES = (
    Run("64 H100, BF16, 14 layers, 64 experts, TP2 PP4 EP16, DeepEP, 2025-11", "h100",
        _proxy(num_gpus=64, pp=4, ep=16, micro=1, dispatcher="deepep", sms=20, software=replace(_PLAIN, te=(2, 9))),
        11.931, "opened", f"{_TESTS}tp1pp4emp16etp1cp1_release_sm (8a9641002b)", _REAL),
    Run("64 H100, BF16, 14 layers, 64 experts, TP2 PP4 EP16, HybridEP, 2026-06", "h100",
        _proxy(num_gpus=64, pp=4, ep=16, micro=1, dispatcher="hybridep", sms=16,
               software=replace(_PLAIN, te=(2, 16), cross_entropy="native")),
        12.383, "opened", f"{_TESTS}tp1pp4emp16etp1cp1_release_sm (bbe66cd7db)", _REAL),
    Run("64 GB200, BF16, 14 layers, 64 experts, TP2 PP4 EP16, HybridEP, 2026-02", "gb200",
        _proxy(num_gpus=64, pp=4, ep=16, micro=1, dispatcher="hybridep", sms=16,
               software=replace(_PLAIN, te=(2, 12), bound=False)),
        7.469, "opened", f"{_TESTS}tp1pp4emp16etp1cp1_gb_200_release_sm (8f87f4947a)", f"{_REAL}; not bound"),
    Run("32 GB200, BF16, 14 layers, 64 experts, TP2 PP2 EP8, HybridEP, four sequences, 2026-04", "gb200", _RACK,
        7.664, "opened", f"{_TESTS}tp2pp2emp16etp1cp1_gb_200_release (46c6040fb0)", f"{_REAL}; not bound"),
    Run("32 GB200, BF16, 14 layers, 64 experts, TP2 PP2 EP8, HybridEP, four sequences, 2026-06", "gb200",
        replace(_RACK, software=replace(_RACK.software, te=(2, 16), cross_entropy="native")),
        7.977, "opened", f"{_TESTS}tp2pp2emp16etp1cp1_gb_200_release_sm (bbe66cd7db)", f"{_REAL}; not bound"),
)  # fmt: skip

# --- DeepSeek-V2's layers on eight B200


def _v2(ep: int, pp: int, microbatches: int) -> Job:
    """Four layers, one of them dense."""
    job = megatron(
        num_gpus=8, pp=pp, ep=ep, batch=microbatches * (8 // pp), layers=[4] if pp == 1 else [2, 2],
        precision=_FP32_MOMENTS, recompute=set(), dispatcher="alltoall", mtp=0, dense=1, drop=True, experts=160,
        vocab=102_528, overlap_grad_reduce=False, software=replace(_PLAIN, te=(2, 11)),
    )  # fmt: skip
    sizes = replace(
        job.sizes, hidden_size=5120, ffn_hidden_size=12_288, moe_ffn_hidden_size=1536, moe_router_topk=6,
        moe_shared_expert_intermediate_size=3072,
    )  # fmt: skip
    return replace(job, sizes=sizes, moe_router_num_groups=ep, moe_router_group_topk=3)


def _v2_runs() -> tuple[Run, ...]:
    measured: dict[tuple[int, int], tuple[float, dict[int, float]]] = {
        (8, 1): (45.63, {4: 366.6, 8: 676.2, 32: 2721.3}),
        (4, 2): (44.70, {4: 282.1, 8: 492.6, 32: 1727.7}),
    }
    assumed = "as the runs of V3's layers of the same summary"
    return tuple(
        Run(f"8 B200, BF16, 4 layers of DeepSeek-V2, PP{pp} EP{ep}, all-to-all, {count} microbatches", "b200",
            _v2(ep, pp, count), ms / 1e3, "opened", SIMUMAX, assumed, peak)
        for (ep, pp), (peak, times) in measured.items()
        for count, ms in times.items()
    )  # fmt: skip


# --- Moonlight on H100, BF16, text

_CARD = "Megatron-Bridge, model_verification_cards/moonlight-16b-a3b"
_STUDY = "Megatron-Bridge, skills/nemo-mbridge-perf-activation-recompute at 067f987df, iterations 11 to 20"
_TEXT = "routing not forced: DeepSeek's load imbalance; bound"


def _moonlight(
    *,
    num_gpus: int,
    tp: int,
    ep: int,
    batch: int,
    micro: int,
    recompute: set[str],
    dispatcher: str,
    moment: int,
) -> Job:
    """Without a pipeline; by all-to-all the shared expert beside it."""
    alltoall = dispatcher == "alltoall"
    job = megatron(
        num_gpus=num_gpus, tp=tp, pp=1, ep=ep, batch=batch, micro=micro, layers=[27], dense=1, mtp=0, experts=64,
        vocab=163_840, precision=replace(BF16_GRADIENTS, moment=moment), recompute=recompute, dispatcher=dispatcher,
        overlap_pairs=not alltoall, communication_sms=20 if alltoall else 32, load_imbalance=LOAD_IMBALANCE,
        shared_expert_overlap=alltoall,
        software=Software(te=(2, 17), cross_entropy="te", router_fusion=not alltoall, rope_fusion=False),
    )  # fmt: skip
    sizes = replace(
        job.sizes, hidden_size=2048, num_attention_heads=16, q_lora_rank=None, ffn_hidden_size=11264,
        moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=2816, moe_router_topk=6,
    )  # fmt: skip
    return replace(job, sizes=sizes, moe_router_num_groups=1, moe_router_group_topk=1)


def _study() -> tuple[Run, ...]:
    """One microbatch a step on one node, each row another recompute."""
    measured: tuple[tuple[set[str], float, float], ...] = (
        (set(), 457.18, 36.618),
        ({"core_attn"}, 474.80, 36.614),
        ({"mla_up_proj"}, 480.89, 35.902),
        ({"mla_up_proj", "mlp"}, 496.73, 35.917),
        ({"moe_act"}, 466.26, 35.941),
        ({"layernorm", "moe_act"}, 506.53, 35.949),
    )
    runs = []
    for recompute, ms, peak_gb in measured:
        job = _moonlight(
            num_gpus=8, tp=2, ep=8, batch=4, micro=1, recompute=recompute, dispatcher="alltoall", moment=2
        )
        again = " and ".join(sorted(recompute)) or "nothing"
        name = f"8 H100, Moonlight, BF16, TP2 EP8, all-to-all, GBS 4, {again} recomputed"
        runs.append(Run(name, "h100", job, ms / 1e3, "opened", _STUDY, _TEXT, peak_gb * 1e9 / 2**30))
    return tuple(runs)


_MOONLIGHT = (
    Run("16 H100, Moonlight, BF16, EP8, HybridEP, overlap, two sequences, GBS 1024", "h100",
        _moonlight(num_gpus=16, tp=1, ep=8, batch=1024, micro=2, recompute=set(), dispatcher="hybridep", moment=2),
        11.63635, "opened", f"{_CARD} at 6a33a2a95", f"{_TEXT}; overlap of one microbatch with the next"),
    Run("16 H100, Moonlight, BF16, EP16, all-to-all, GBS 1024", "h100",
        _moonlight(num_gpus=16, tp=1, ep=16, batch=1024, micro=1, recompute={"core_attn"}, dispatcher="alltoall",
                   moment=4),
        24.56929, "opened", f"{_CARD} at 16846a8da", f"{_TEXT}; core attention recomputed, Megatron's default"),
    *_study(),
)  # fmt: skip
SMALL: tuple[Run, ...] = (*_PROXIES, *_v2_runs(), *_MOONLIGHT)
