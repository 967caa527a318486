"""Host time: launches by what is asked for, hosts by what was measured of them."""

from dataclasses import replace

import pytest

from dsv3_megatron.plan import calibration_host
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.host_time import GRACE, Launches, parts, waits
from dsv3_megatron.plan.job import Job, Software
from dsv3_megatron.plan.operators import Operators
from dsv3_megatron.plan.published import RUNS
from dsv3_megatron.plan.stage_times import stage_times
from dsv3_megatron.plan.token_exchange import permutations


def run(name: str) -> Job:
    return next(one.job for one in RUNS if one.name == name)


B200 = run("256 B200, MXFP8, PP16 EP8, all-to-all, GBS 2048")
GUIDE = run("256 GB200, MXFP8, PP8 VPP4 EP32, step 1: all-to-all")
GB200_DROP = run("128 GB200, BF16, TP2 PP4 EP32, all-to-all, token drop")


def software(job: Job, **changed: object) -> Job:
    return replace(job, software=replace(job.software, **changed))  # type: ignore[arg-type]


def test_x86_is_grace_by_one_linear_layer_and_the_clock() -> None:
    """Transformer Engine #2053: 13.48 us on DGX H100's host where Grace takes 37.08."""
    h100, b200, b300 = (GPUS[name].host for name in ("h100", "b200", "b300"))
    for name in ("kernel", "module", "product"):
        assert getattr(h100, name) == pytest.approx(getattr(GRACE, name) * 13.48 / 37.08)
        assert getattr(b200, name) * 4.0 == pytest.approx(getattr(h100, name) * 3.8)
        assert getattr(b300, name) < getattr(b200, name)
    assert GPUS["gb300"].host == GRACE and h100.link < GRACE.link


def test_modules_cost_less_since_2_11() -> None:
    """By what a linear layer took before and after; kernels and experts' tensors cost what they did."""
    old, new = Software(te=(2, 10)), Software(te=(2, 11))
    one = Launches(modules=1)
    assert GRACE.seconds(one, old) - GRACE.seconds(one, new) == pytest.approx(62.58e-6)
    for same in (Launches(kernels=7), Launches(products=7)):
        assert GRACE.seconds(same, old) == GRACE.seconds(same, new)
    assert GRACE.seconds(one, replace(old, bound=False)) == pytest.approx(1.5 * GRACE.seconds(one, old))


def test_experts_tensors_are_those_of_fp8() -> None:
    """Each expert's operand and product, both linear layers: 4 and 6 of them; none in BF16."""
    fp8 = parts(B200, moe=True).second
    assert [one.products for one in fp8] == [4 * B200.local_experts, 6 * B200.local_experts]
    bf16 = replace(B200, precision=replace(B200.precision, fp8=False, recipe=""))
    assert [one.products for one in parts(bf16, moe=True).second] == [0, 0]
    assert [one.products for one in parts(B200, moe=False).second] == [0, 0]


@pytest.mark.parametrize("name", ["rope_fusion", "fused_attention"])
def test_what_is_not_fused_launches_more(name: str) -> None:
    job = replace(B200, recompute=frozenset())
    for way in (0, 1):
        fused, alone = (
            parts(job, moe=True).first[way],
            parts(software(job, **{name: False}), moe=True).first[way],
        )
        assert alone.kernels > fused.kernels and alone.modules == fused.modules
    again = replace(job, recompute=frozenset({"core_attn", "mla_up_proj"}))
    plain = (
        parts(software(job, **{name: False}), moe=True).first[1].kernels
        - parts(job, moe=True).first[1].kernels
    )
    more = (
        parts(software(again, **{name: False}), moe=True).first[1].kernels
        - parts(again, moe=True).first[1].kernels
    )
    assert more > plain  # what is computed again is launched again


def test_rows_are_padded_where_nobody_has() -> None:
    """Megatron's `skip_routed_expert_padding`, FP8 only: two copies of all rows there and two back."""
    row = 2 * 2 * B200.tokens * B200.sizes.hidden_size * B200.sizes.moe_router_topk
    padded = software(B200, router_padding=True)
    assert B200.experts_pad and permutations(B200) - permutations(padded) == pytest.approx(2 * row)
    hybridep = replace(B200, dispatcher="flex", flex_backend="hybridep")
    bf16 = replace(B200, precision=replace(B200.precision, fp8=False, recipe=""))
    assert not any(job.experts_pad for job in (padded, hybridep, bf16, replace(B200, capacity_factor=1.0)))
    assert replace(hybridep, flex_backend="deepep").experts_pad


def test_the_shared_expert_hides_behind_communication() -> None:
    """As far as dispatch and combine are long, on the SMs that they leave."""

    def mlp(job: Job) -> float:
        layer = Operators(job, GPUS["b200"]).moe_layer()
        return layer.mlp_f + layer.mlp_b + layer.mlp_w

    beside, after = (replace(B200, shared_expert_overlap=overlap) for overlap in (True, False))
    layer, shared = (
        Operators(B200, GPUS["b200"]).moe_layer(),
        Operators(B200, GPUS["b200"])._mlp(2048, 4096, ""),
    )
    hidden = mlp(after) - mlp(beside)
    assert 0 < hidden <= sum(shared) * (1 + 1e-9)
    assert hidden < layer.dispatch + layer.combine + layer.dispatch_b + layer.combine_b
    alone = [replace(job, layout=replace(job.layout, ep=1)) for job in (beside, after)]
    assert mlp(alone[0]) == mlp(alone[1])  # nothing is sent, so nothing hides


def test_tokens_padded_to_a_capacity_fill_their_tiles_and_need_no_waiting() -> None:
    assert waits(B200) and not waits(replace(B200, capacity_factor=1.0))
    assert not waits(GB200_DROP)


def test_losses_are_where_the_head_is() -> None:
    """MTP in a stage of its own leaves its loss with the model's: the same work, in another stage."""
    paper = run("256 GB200, BF16, PP8 VPP4 EP32, HybridEP")
    gpu = GPUS["gb200"]
    mtp, loss = paper.stages[-2:]
    together = replace(mtp, head=True)
    apart = [stage_times(paper, gpu, stage) for stage in (mtp, loss)]
    whole = stage_times(paper, gpu, together)
    assert sum(one.f for one in apart) == pytest.approx(whole.f, rel=0.02)
    assert sum(one.b for one in apart) == pytest.approx(whole.b, rel=0.02)
    assert apart[1].f > stage_times(replace(paper, sizes=replace(paper.sizes, mtp_num_layers=0)), gpu, loss).f


def test_nvidias_own_attention_is_met() -> None:
    """cudnn-frontend 3929da2, sdpa_benchmark_training, dsv3, causal, BF16, two sequences: none of it was fitted."""
    measured = {"gb200": (0.977, 3.383), "gb300": (0.864, 3.127)}
    job = replace(
        run("256 GB200, BF16, PP4 VPP4 EP64, HybridEP, no MTP"), micro_batch_size=2, recompute=frozenset()
    )
    for name, (forward, backward) in measured.items():
        gpu = replace(GPUS[name], watts=2 * GPUS[name].achieved.full_watts)  # nothing else draws power
        ops, a, s = Operators(job, gpu), gpu.achieved, job.sizes
        qk = s.qk_head_dim + s.qk_pos_emb_head_dim
        flops = s.num_attention_heads * (qk + s.v_head_dim) * s.seq_length * job.tokens
        f = ops._attending(flops, a.attention_forward, qk + s.v_head_dim)
        b = ops._attending(2.5 * flops, a.attention_backward, 3 * qk + 2 * s.v_head_dim)
        assert 1e3 * f == pytest.approx(forward, rel=0.10) and 1e3 * b == pytest.approx(backward, rel=0.10), (
            name
        )


@pytest.mark.slow
def test_the_table_holds_what_the_guide_gives() -> None:
    fitted = calibration_host.fit()
    assert {run.half for run in calibration_host.rows()} == {"fitted"} and len(calibration_host.rows()) == 7
    for name in ("kernel", "module", "product", "unbound"):
        assert getattr(fitted, name) == pytest.approx(getattr(GRACE, name), rel=0.05), name
