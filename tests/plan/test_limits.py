"""The planner answers to its inputs: every number moves the right way, and the limits are what they must be."""

import dataclasses
from dataclasses import replace

import pytest

from dsv3_megatron.pipeline import build_schedule, simulate
from dsv3_megatron.pipeline.build import INTERLEAVED
from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.compare import place, with_layout
from dsv3_megatron.plan.destinations import destinations
from dsv3_megatron.plan.hardware import GPUS, without_communication
from dsv3_megatron.plan.job import Job, PlanError, Stage
from dsv3_megatron.plan.operators import Operators
from dsv3_megatron.plan.stage_times import costs, pair, stage_times
from dsv3_megatron.plan.step import Plan, plan
from dsv3_megatron.plan.token_exchange import copies

H800 = GPUS["h800"]
JOB = deepseek.JOB


def planned(job: Job = JOB, gpu=H800) -> Plan:
    return plan(job, gpu, deepseek.COUNTS)


def on(**changes: object) -> Job:
    """The job on another layout."""
    return with_layout(JOB, replace(JOB.layout, **changes))  # type: ignore[arg-type]


# --- monotony


def test_half_the_microbatches() -> None:
    whole, half = planned(), planned(replace(JOB, global_batch_size=7680))
    assert half.job.num_microbatches == whole.job.num_microbatches / 2
    assert 0.5 * whole.step_s < half.step_s < 0.6 * whole.step_s  # the bubble and the update stay
    assert half.tokens_per_s_per_gpu < whole.tokens_per_s_per_gpu
    assert half.bubble_s == pytest.approx(
        whole.bubble_s, rel=0.1
    )  # it grows a little where stages are uneven
    assert half.gpu_hours(1e12) > whole.gpu_hours(1e12)
    assert half.days(1e12) > whole.days(1e12)
    assert half.memory_gib == pytest.approx(whole.memory_gib)  # what is in flight is bounded by the schedule


def _words(change: dict) -> str:
    """A test's name; sets have an order in it."""
    return ",".join(f"{k}={sorted(v) if isinstance(v, frozenset) else v}" for k, v in change.items())


@pytest.mark.parametrize("slower, faster", [("h800", "h100"), ("h100", "gb200")])
def test_better_hardware_is_faster(slower: str, faster: str) -> None:
    job = on(ep=8)  # all-to-all over NVLink: H800 and H100 differ in nothing else
    slow, fast = planned(job, GPUS[slower]), planned(job, GPUS[faster])
    assert fast.step_s < slow.step_s
    assert fast.days(1e12) < slow.days(1e12)


def test_more_memory_of_h200_changes_what_fits_and_hardly_the_time() -> None:
    big = replace(JOB, recompute=frozenset())
    assert not planned(big, GPUS["h100"]).fits
    assert planned(big, GPUS["h200"]).fits
    assert planned(big, GPUS["h200"]).step_s == pytest.approx(planned(big, GPUS["h100"]).step_s, rel=0.15)


def test_more_expert_parallelism_takes_less_memory_and_more_communication() -> None:
    few, many = on(ep=16), on(ep=128)
    assert max(planned(many).memory_gib) < max(planned(few).memory_gib)
    assert Operators(many, H800).all_to_all(2) > Operators(few, H800).all_to_all(2)
    unpaired = [replace(job, layout=replace(job.layout, overlap_pairs=False)) for job in (few, many)]
    assert planned(unpaired[1]).simulation.makespan > planned(unpaired[0]).simulation.makespan


def test_weight_gradients_that_do_not_wait_hide_less() -> None:
    """In the same slot as their input gradient; it shows where a slot's messages are longer than what computes."""
    apart = on(ep=128)
    together = replace(apart, layout=replace(apart.layout, wgrad_apart=False))
    ops = Operators(apart, H800)
    pairs = [pair(ops.moe_layer(), ops.moe_layer(beside=True), job, H800) for job in (apart, together)]
    work = [sum(p.compute) for p in pairs]
    assert work[0] == pytest.approx(work[1]) and pairs[1].compute[1] > pairs[0].compute[1]
    assert planned(together).step_s > planned(apart).step_s


def test_schedules_in_the_order_of_their_bubbles() -> None:
    plans = {name: planned(on(schedule=name)) for name in ("1f1b", "zb1p", "dualpipe")}
    assert plans["1f1b"].step_s > plans["zb1p"].step_s > plans["dualpipe"].step_s
    parameters = {name: p.memory[1].parts["parameters"] for name, p in plans.items()}
    assert parameters["dualpipe"] == pytest.approx(2 * parameters["1f1b"])
    assert parameters["zb1p"] == parameters["1f1b"]
    assert planned(on(schedule=INTERLEAVED, num_model_chunks=2, pp=8)).step_s < plans["1f1b"].step_s


@pytest.mark.parametrize(
    "change",
    [
        {"load_imbalance": 1.2},
        {"recompute": JOB.recompute | {"core_attn"}},
        {"recompute": JOB.recompute | {"shared_experts"}},
        {"recompute": JOB.recompute | {"moe"}},
        {"precision": replace(JOB.precision, fp8=False)},
        {"precision": replace(JOB.precision, fp8_dispatch=False)},
    ],
    ids=_words,
)
def test_slower(change: dict) -> None:
    # Without pairs, so that no difference hides behind communication.
    job = replace(JOB, layout=replace(JOB.layout, overlap_pairs=False))
    assert planned(replace(job, **change)).step_s > planned(job).step_s


BLOCKWISE = replace(JOB.precision, fp8_caches=False)


@pytest.mark.parametrize(
    "fewer, more",
    [
        ({"recompute": frozenset({"full"})}, {}),
        ({}, {"recompute": JOB.recompute - {"mla_up_proj"}}),
        # `--fp8-recipe dsv3` never keeps SwiGLU's output; TE's own block scaling does.
        ({"precision": BLOCKWISE}, {"precision": BLOCKWISE, "recompute": JOB.recompute - {"moe_act"}}),
        ({"recompute": frozenset({"layernorm"})}, {"recompute": frozenset()}),
        ({}, {"precision": replace(JOB.precision, fp8=False)}),
        ({}, {"micro_batch_size": 2}),
        ({}, {"load_imbalance": 1.5}),
        ({}, {"distributed_optimizer": False}),
    ],
    ids=_words,
)
def test_memory(fewer: dict, more: dict) -> None:
    small, large = planned(replace(JOB, **fewer)), planned(replace(JOB, **more))
    assert all(a < b for a, b in zip(small.memory_gib, large.memory_gib, strict=True))


# --- limits


def test_without_communication_a_pair_is_its_computation() -> None:
    free = without_communication(H800)
    ops = Operators(JOB, free)
    layer = ops.moe_layer()
    assert (layer.dispatch, layer.combine, layer.dispatch_b, layer.combine_b, ops.message()) == (
        0,
        0,
        0,
        0,
        0,
    )
    computing = pair(layer, ops.moe_layer(beside=True), JOB, free)
    a = free.achieved
    assert computing.length == pytest.approx(
        (layer.f + layer.b) * 132 / (132 - a.communication_sms) + a.pair_gap
    )
    assert planned(gpu=free).step_s < planned().step_s


def test_shared_sms_compute_on_when_communication_ends() -> None:
    """All SMs for as long as nothing communicates; as long as what is longer; none taken, none lost."""
    ops = Operators(JOB, H800)
    layer, beside = ops.moe_layer(), ops.moe_layer(beside=True)
    a = H800.achieved
    reserved = pair(layer, beside, JOB, H800)
    lengths = []
    for sms in (0, a.communication_sms, 60):
        shared = pair(layer, beside, replace(JOB, communication_sms=sms), H800)
        lengths.append(shared.length)
        for alone, taken, talk in zip(
            pair(layer, beside, replace(JOB, communication_sms=0), H800).compute,
            shared.compute,
            shared.communicate,
            strict=True,
        ):
            # Work of all SMs is what those that are left do meanwhile, and all of them afterwards.
            assert alone == pytest.approx(talk * (1 - sms / H800.sms) + (taken - talk))
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] <= reserved.length
    graph = pair(layer, beside, replace(JOB, whole_iteration_graph=True), H800)
    assert graph.length == pytest.approx(reserved.length - a.pair_gap)


def test_infinite_bandwidth_leaves_the_schedule_and_its_bubble() -> None:
    """With every operator free but products, F = 1 share of their FLOPs and B = 2: the closed form of 1F1B."""
    inf = float("inf")
    gpu = replace(without_communication(H800), hbm=inf, bf16=inf)
    job = replace(on(schedule="1f1b"), recompute=frozenset(), stages=(Stage(moe=4),) * 16)
    result = planned(job, gpu)
    f = stage_times(job, gpu, Stage(moe=4)).f
    assert stage_times(job, gpu, Stage(moe=4)).b == pytest.approx(2 * f)
    assert result.simulation.bubble[0] == pytest.approx(15 * 3 * f)
    assert result.update.seconds == 0


def test_one_stage_has_no_bubble_and_no_messages() -> None:
    job = replace(
        JOB,
        layout=replace(JOB.layout, pp=1, schedule="1f1b", num_gpus=128),
        stages=place(JOB, 1),
        global_batch_size=256,
    )
    result = planned(job)
    assert result.bubble_s == pytest.approx(0, abs=1e-9)
    one = stage_times(job, H800, job.stages[0])
    assert result.simulation.makespan == pytest.approx(job.num_microbatches * (one.f + one.b))
    assert "messages" not in result.memory[0].parts or result.memory[0].parts["messages"] == 0


def test_the_bubble_is_the_simulators() -> None:
    """Not a formula of the planner's: the same table and costs, simulated apart."""
    job = on(schedule="zb1p")
    table = build_schedule("zb1p", 16, job.num_microbatches)
    assert planned(job).simulation.bubble == simulate(table, costs(job, H800)).bubble


def test_destinations_of_a_token() -> None:
    """4 of 8 groups, 8 experts (R§2.1.2): at most 4 nodes, of which one may be the token's own."""
    to = destinations(JOB, 8)
    assert to.domains == pytest.approx(4 * 7 / 8)  # EP64 on 8 nodes: exactly 4 nodes, 7 of 8 others
    assert 7 < to.ranks < 8
    assert destinations(on(ep=8), 8).domains == 0  # inside a node
    assert destinations(JOB, 72).domains == 0  # inside a rack
    two_nodes = destinations(on(ep=16), 8).domains
    assert two_nodes == pytest.approx((1 - 1 / 70) * 2 / 2)  # 4 of 8 groups miss a half in 1 of 70 choices


@pytest.mark.parametrize("ep, domain", [(128, 72), (256, 72), (64, 8), (256, 8), (32, 4)])
def test_destinations_are_those_of_drawn_tokens(ep: int, domain: int) -> None:
    """Against tokens that are drawn: experts of EP128 and EP256 lie in racks that do not divide them."""
    import random

    draw, job, tokens = random.Random(0), on(ep=ep), 4000
    domains = ranks = outside = 0
    for _ in range(tokens):
        own = draw.randrange(ep)
        chosen = [32 * g + e for g in draw.sample(range(8), 4) for e in draw.sample(range(32), 2)]
        homes = [expert * ep // 256 for expert in chosen]
        domains += len({rank // domain for rank in homes} - {own // domain})
        ranks += len(set(homes) - {own})
        outside += sum(rank // domain != own // domain for rank in homes)
    to = destinations(job, domain)
    assert (domains / tokens, ranks / tokens, outside / tokens) == pytest.approx(
        (to.domains, to.ranks, to.experts_outside), rel=0.04
    )


# --- refusals


@pytest.mark.parametrize(
    "change, words",
    [
        ({"global_batch_size": 1000}, ["global_batch_size=1000", "128 data-parallel"]),
        ({"stages": JOB.stages[:-1]}, ["pipeline_model_parallel_layout", "15 stages"]),
    ],
)
def test_a_job_that_does_not_divide_names_the_option(change: dict, words: list[str]) -> None:
    with pytest.raises(PlanError) as error:
        replace(JOB, **change)
    assert all(word in str(error.value) for word in words)


def test_too_few_microbatches_name_the_batch() -> None:
    with pytest.raises(PlanError, match=r"global_batch_size=1280 .*num_microbatches=10 is too few"):
        planned(replace(JOB, global_batch_size=1280))


def test_fields_are_all_used() -> None:
    """A field of a job that changes nothing would be a number that the planner ignores."""
    text = "".join(
        path.read_text() for path in __import__("pathlib").Path(deepseek.__file__).parent.glob("*.py")
    )
    for field in dataclasses.fields(Job):
        assert text.count(f"job.{field.name}") + text.count(f"self.{field.name}") > 0, field.name


# --- dispatch


def per_token(job: Job) -> float:
    """Bytes over InfiniBand of a token's dispatch and combine, forward."""
    size = 1 + 4 / 128 if job.precision.fp8_dispatch else 2
    return job.sizes.hidden_size * (copies(job, 8).ib * size + copies(job, 8, back=True).ib * 2)


def test_copies_per_expert_or_per_node() -> None:
    """By hand, for 8 experts on 4 of 8 nodes: DeepEP sends 3.5 copies to other nodes, an all-to-all 7.

    So E4M3 by all-to-all is as many bytes as BF16 through DeepEP, and combine is twice as many.
    """
    flex, plain = replace(JOB, dispatcher="flex"), replace(JOB, dispatcher="alltoall")
    assert copies(flex, 8).ib == pytest.approx(3.5)
    assert copies(plain, 8) == pytest.approx((7.0, 8 * 7 / 64))
    assert copies(replace(plain, layout=replace(JOB.layout, ep=8)), 8) == pytest.approx((0, 7))
    in_bf16 = replace(flex, precision=replace(JOB.precision, fp8_dispatch=False))
    assert per_token(plain) == pytest.approx(7 * 7168 * (1.03125 + 2))
    assert per_token(in_bf16) == pytest.approx(3.5 * 7168 * 4)
    assert per_token(flex) < per_token(in_bf16) < per_token(plain)
    steps = [planned(job).step_s for job in (flex, in_bf16, plain)]
    assert steps == sorted(steps) and steps[0] < steps[2]
