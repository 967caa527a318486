"""Zigzag in the planner: the step of DeepSeek's own job, its memory, and what the search says to the trainer."""

from dataclasses import replace

import pytest

from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.candidates import Space, search
from dsv3_megatron.plan.compare import comparison, with_layout
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.step import plan

H800 = GPUS["h800"]
JOB = replace(deepseek.JOB, load_imbalance=LOAD_IMBALANCE)
ZIGZAG = replace(JOB.layout, pp=8, schedule="zigzag", num_model_chunks=2)


def test_deepseeks_step_at_the_same_memory() -> None:
    """One V on half the pipeline ranks with DualPipe's own 16 uneven stages: 1.2% and more off the step."""
    dualpipe, zigzag = (
        plan(replace(JOB, layout=layout), H800, deepseek.COUNTS) for layout in (JOB.layout, ZIGZAG)
    )
    gain = 1 - zigzag.step_s / dualpipe.step_s
    print(f"{dualpipe.step_s:.2f} s, {zigzag.step_s:.2f} s, {gain:.2%}")
    assert 0.012 < gain < 0.02
    assert max(zigzag.memory_gib) == pytest.approx(max(dualpipe.memory_gib), rel=0.01)


def test_the_search_chooses_chunks_and_cap() -> None:
    space = Space(
        tensor_model_parallel_size=(1,),
        context_parallel_size=(1,),
        pipeline_model_parallel_size=(4,),
        expert_model_parallel_size=(64,),
        micro_batch_size=(1,),
        schedule=(("zigzag", 2), ("zigzag", 4)),
        recompute_modules=(("layernorm", "mla_up_proj"),),
        last_stage_extra=(3,),
    )
    roomy = replace(H800, memory=400 * 2**30)
    found = search(JOB, roomy, {1: deepseek.COUNTS}, space, num_best=4)
    assert len(found.best) == 4
    caps = {
        (c.job.layout.num_model_chunks, dict(c.job.layout.zigzag).get("memory_cap")) for _, c in found.best
    }
    assert len(caps) == 4
    best = found.best[0][1]
    words = best.overrides()
    assert (
        "schedule=zigzag" in words and f"pipeline_zigzag_chunks={best.job.layout.num_model_chunks}" in words
    )
    capped = next(c for _, c in found.best if c.job.layout.zigzag)
    assert any(word.startswith("pipeline_zigzag_memory_cap=") for word in capped.overrides())
    # What is found is what a plan of it says.
    assert plan(best.job, roomy, deepseek.COUNTS).step_s == found.best[0][0].step_s
    # Where memory forbids it, it is refused as such, whether before or after its table is dealt.
    tight = search(JOB, replace(H800, memory=60 * 2**30), {1: deepseek.COUNTS}, space, num_best=4)
    assert not tight.best and tight.refused["memory"][0] == 4


def test_a_cap_that_is_too_small_is_refused() -> None:
    job = with_layout(JOB, replace(ZIGZAG, zigzag=(("memory_cap", 9.0),)))
    with pytest.raises(PlanError, match="memory_cap=9"):
        plan(job, H800, deepseek.COUNTS)


@pytest.mark.slow
def test_the_comparison_has_its_rows() -> None:
    text = comparison(JOB, H800, deepseek.COUNTS)
    assert "| zigzag, 2 chunks |" in text and "| zigzag, 2 chunks on PP8 |" in text
