"""`dsv3 plan serve`: arithmetic by hand, memory that adds up, its words and their refusals."""

import json
from dataclasses import replace

import pytest

from dsv3_megatron.conf import ConfigError, compose
from dsv3_megatron.plan.deepseek import SIZES
from dsv3_megatron.plan.hardware import GPUS, without_communication
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.serve import time
from dsv3_megatron.plan.serve.__main__ import main
from dsv3_megatron.plan.serve.job import ServingJob
from dsv3_megatron.plan.serve.memory import longest_context, max_batch, memory_parts
from dsv3_megatron.plan.serve.options import job_of, parse
from dsv3_megatron.plan.serve.published import MEASURED, error_rows
from dsv3_megatron.plan.serve.result import full, serve, variants, without_copies
from dsv3_megatron.specs.deployment import Deployment

DECODE = ServingJob(
    sizes=SIZES,
    gpu=GPUS["h800"],
    num_gpus=320,
    tp=4,
    phase="decode",
    deployment=Deployment(64, True, True, 1),
    context=4096,
    batch=32,
    weights="fp8",
)
PREFILL = replace(DECODE, num_gpus=32, phase="prefill", deployment=Deployment(32, False, True, 2), batch=1)
WORDS = ["model=v3_671b", "layout=decode_tp4_dp80_ep320"]


def test_the_cache_of_a_token_is_the_published_one():
    assert DECODE.cache_bytes_per_token == 61 * (512 + 64) * 2 == 70_272
    assert replace(DECODE, acceptance=0.85).cache_bytes_per_token == 62 * 576 * 2  # the drafting layer's too


def test_decoding_reads_the_cache_and_one_expert():
    """A layer by hand: 32 requests per GPU of a replica of four, whose cache each of the four reads."""
    moe = time.step_time(DECODE).moe
    hbm = 3.35e12 * 0.80
    cache = 128 * 4096 * 576 * 2 / hbm
    flops = 2 * 128 * 4096 * (576 + 512) * 32 / (989.5e12 * 0.584 * DECODE.gpu.sustained)
    assert moe.core == pytest.approx(max(cache, flops))
    expert = 3 * 7168 * 2048
    assert moe.mlp == pytest.approx(
        max(expert / hbm, 2 * expert * 32 * 9 / (1979e12 * 0.504 * DECODE.gpu.sustained))
    )
    copies = 32 * 9 * 39 / 40
    assert moe.combine == pytest.approx(copies * 7168 * 2 / (50e9 * time.LOW_LATENCY_IB))
    assert moe.dispatch == pytest.approx(copies * 7168 * (1 + 1 / 32) / (50e9 * time.LOW_LATENCY_IB))


def test_what_is_between_the_products_are_bytes():
    """Decoding, 32 tokens per GPU: by hand from what each kernel reads and writes, in bf16 and e4m3."""
    heads = 128 * (2 * 192 + 2 * 576 + 2 * 512 + 3 * 128) * 2  # queries; absorbed; results; values
    norms = 6 * 7168 * 2 + 8 * (1536 + 512)
    expert = 2048 * (2 * 2 * 2 + 1) + 7168 * (2 + 2)
    moe = time.step_time(DECODE).moe
    assert moe.between == pytest.approx(32 * (heads + norms + 9 * expert) / (3.35e12 * 0.80))


def test_without_links_time_is_the_products():
    free = replace(DECODE, gpu=without_communication(DECODE.gpu), tp=1)
    step, gap = time.step_time(free), time.GAP["decode"]
    assert step.moe.messages == 0
    parts = 58 * (step.moe.compute + gap) + 3 * (step.dense.compute + gap / 2) + step.head
    assert step.total == pytest.approx(parts)


def test_prefilling_multiplies_what_flops_say():
    """Expanded attention of whole prompts: products within a tenth of 2 × active parameters + causal attention."""
    job = replace(
        PREFILL, tp=1, num_gpus=1, gpu=replace(without_communication(PREFILL.gpu), memory=1e13),
        deployment=Deployment(0, False, True, 1), absorbed_prefill=False, batch=4, weights="bf16",
    )  # fmt: skip
    tokens = 4 * 4096
    active = 37.55e9 - 2 * 129_280 * 7168  # without embedding and head
    attention = 61 * 2 * 4096 / 2 * 128 * (192 + 128)
    expected = tokens * (2 * active / (989.5e12 * 0.70) + attention / (989.5e12 * 0.584))
    step = time.step_time(job)
    between = 58 * step.moe.between + 3 * step.dense.between
    assert step.total - between == pytest.approx(expected / job.gpu.sustained, rel=0.1)
    assert 0.1 < between / step.total < 0.25


def test_overlapped_halves_hide_the_shorter_of_the_two():
    one = replace(PREFILL, deployment=Deployment(32, False, True, 1))
    two = time.step_time(PREFILL)
    assert two.total < time.step_time(one).total
    slower = 132 / (132 - 20)  # SMs that DeepEP's kernels take from the products while they run
    half = (two.total - two.head - 3 * 2 * (two.dense.compute + time.GAP["prefill"] / 2)) / 58 / 2
    half -= time.GAP["prefill"]
    assert two.moe.messages < two.moe.compute < half < two.moe.compute * slower
    assert two.moe.messages / slower + (half - two.moe.messages) == pytest.approx(
        two.moe.compute
    )  # work done
    slow = replace(PREFILL, gpu=replace(PREFILL.gpu, ib=5e9))
    waiting = time.step_time(slow)
    assert waiting.moe.messages > waiting.moe.compute * slower
    assert waiting.total - two.total == pytest.approx(58 * 2 * (waiting.moe.messages - half))


@pytest.mark.parametrize("job", [DECODE, PREFILL, replace(DECODE, acceptance=0.85, weights="fp8")])
def test_memory_is_full_with_the_most_requests(job):
    most = full(job)
    assert sum(memory_parts(most).values()) == pytest.approx(job.gpu.memory)
    with pytest.raises(PlanError, match=r"batch=.*do not fit; the most is batch="):
        serve(replace(job, batch=most.batch * 1.01))


def test_a_request_that_no_replica_holds_is_refused():
    holds = int(longest_context(DECODE))
    serve(full(replace(DECODE, context=holds)))
    with pytest.raises(
        PlanError, match=f"context={holds + 1}: a GPU's cache holds {holds} tokens of one request"
    ):
        serve(full(replace(DECODE, context=holds + 1)))


def test_weights_that_do_not_fit_are_refused():
    small = replace(DECODE, num_gpus=8, deployment=Deployment(0, False, True, 1), weights="bf16")
    assert max_batch(small) < 0
    with pytest.raises(PlanError, match="weights=fp8"):
        serve(small)


def test_drafts_and_copies_on_and_off():
    found = {name: serve(job) for name, job in variants(DECODE).items()}
    assert list(found) == [f"redundancy {r}, MTP {m}" for r in ("on", "off") for m in ("off", "on")]
    plain, drafting = found["redundancy on, MTP off"], found["redundancy on, MTP on"]
    assert plain.latency_per_token_s > drafting.latency_per_token_s
    assert 1 < drafting.tokens_per_s_per_gpu / plain.tokens_per_s_per_gpu < 1.85
    off = without_copies(DECODE)
    assert (off.num_gpus, off.num_slots, off.topk) == (256, 256, 8)


def test_published_rows_say_their_half_and_have_the_errors_of_the_page():
    rows = error_rows()
    halves = [row["half"] for row in rows]
    assert len(rows) == len(MEASURED) and halves == ["judge", "judge", "judge", "fitted", "judge", "judge"]
    assert {row["published_tokens_per_s_per_node"] for row in rows[:2]} == {73_700, 14_800}
    errors = [float(row["error_percent"]) for row in rows]
    assert [round(error) for error in errors] == [64, -10, 1, 0, 14, 14]
    assert abs(errors[halves.index("fitted")]) < 0.1  # which is what `GAP` of decoding was chosen for


def test_json_has_one_line(capsys):
    main([*WORDS, "batch=16", "mtp=0.9", "output=json"])
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["phase"] == "decode" and told["gpus"] == 320 and told["mtp_acceptance"] == 0.9
    assert told["latency_per_token_s"] == pytest.approx(told["step_s"] / 1.9)
    assert told["tokens_per_s_per_gpu"] == pytest.approx(16 * 1.9 / told["step_s"])
    assert told["cache_bytes_per_request"] == 4096 * told["cache_bytes_per_token"]
    assert len(told["variants"]) == 4 and len(told["errors"]) == 6


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["layout=pp16_ep64"], "layout=pp16_ep64: is a layout for training"),
        ([], "layout: is a layout for training"),
        (["context=0"], "context=0: use a whole number from 1"),
        (["context=1.5"], "context=1.5: use a whole number"),
        (["batch=-1"], "batch=-1: use a number above 0"),
        (["batch=many"], "batch=many: use a number"),
        (["mtp=2"], "mtp=2: use mtp=on, mtp=off or a number from 0 to 1"),
        (["weights=fp4"], "weights=fp4: use weights=bf16 or weights=fp8"),
        (["redundancy=maybe"], "use redundancy=on or redundancy=off"),
        (["output=xml"], "use output=table or output=json"),
        (["imbalance=0.5"], "imbalance=0.5: use a number from 1"),
        (
            ["layout=decode_tp4_dp80_ep320", "imbalance=40"],
            "imbalance=40: the fullest of 320 GPUs has at most 35.5556",
        ),
        (["cached=1"], "cached=1: use a number from 0 to below 1"),
        (["nonsense"], "write NAME=VALUE"),
        (["layout=decode_tp4_dp80_ep320", "contxt=8192"], "contxt=8192: no such argument"),
        (["layout=prefill_tp4_dp8_ep32", "mtp=on"], "drafts are of decoding"),
        (["layout=decode_tp4_dp80_ep320", "cached=0.5"], "cached=0.5: is of prefilling"),
        (["layout=decode_tp4_dp80_ep320", "attention=expanded"], "attention=expanded: is of prefilling"),
        (["layout=decode_tp4_dp80_ep320", "serving.redundant_experts=63"], "do not lie evenly on 320"),
        (["layout=decode_tp4_dp80_ep320", "serving.phase=both"], "serving.phase=both: use prefill or decode"),
        (["layout=decode_tp4_dp80_ep320", "serving.nothing=1"], "serving.nothing=1: no such entry"),
        (["layout=pp16_ep64", "serving.microbatches=2"], "would do nothing: the layout is for training"),
    ],
)
def test_wrong_words_are_named(words, named):
    with pytest.raises((PlanError, ConfigError), match="^.*" + named.replace("(", r"\(")):
        job_of(parse(["model=v3_671b", *words]))


def test_training_takes_no_layout_for_serving():
    with pytest.raises(ConfigError, match="layout=decode_tp4_dp80_ep320: is a layout for serving"):
        compose(WORDS)
