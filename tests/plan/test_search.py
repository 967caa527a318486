"""The search: what is fast in it must be what the slow way says, and DeepSeek's layout must be found."""

import time
from dataclasses import replace

import pytest

from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.candidates import SCHEDULES, Space, busiest_rank, least_memory, peak_memory, search
from dsv3_megatron.plan.compare import with_layout
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.memory import plan_memory
from dsv3_megatron.plan.search import _row
from dsv3_megatron.plan.step import plan, schedule_of

H800 = GPUS["h800"]
JOB = replace(deepseek.JOB, load_imbalance=LOAD_IMBALANCE)
COUNTS = {1: deepseek.COUNTS}


@pytest.mark.parametrize("schedule, chunks", SCHEDULES)
def test_sums_are_the_walk_and_the_bound_holds(schedule: str, chunks: int) -> None:
    layout = replace(JOB.layout, pp=8, schedule=schedule, num_model_chunks=chunks)
    job = with_layout(JOB, layout)
    walked = max(rank.peak for rank in plan_memory(job, deepseek.COUNTS, schedule_of(job), H800))
    assert peak_memory(job, H800, deepseek.COUNTS) == pytest.approx(walked)
    if schedule == "zigzag":  # looked at before there is a table
        assert 0.8 * walked < least_memory(job, H800, deepseek.COUNTS) <= walked
    assert busiest_rank(job, H800) <= plan(job, H800, deepseek.COUNTS).simulation.makespan


def test_deepseeks_cluster() -> None:
    space = Space(
        tensor_model_parallel_size=(1,),
        context_parallel_size=(1,),
        pipeline_model_parallel_size=(8, 16),
        expert_model_parallel_size=(32, 64),
        micro_batch_size=(1,),
        recompute_modules=(("layernorm", "mla_up_proj"),),
        last_stage_extra=(3,),
    )
    found = search(JOB, H800, COUNTS, space, num_best=4)
    published = plan(JOB, H800, deepseek.COUNTS)
    assert found.best[0][0].step_s <= published.step_s
    steps = [result.step_s for result, _ in found.best]
    assert steps == sorted(steps)
    assert all(result.fits for result, _ in found.best)
    assert JOB.layout in [candidate.job.layout for _, candidate in found.best]
    # Nothing that was not simulated is better than what was kept.
    assert found.num_simulated < found.num_candidates
    assert sum(count for count, _ in found.refused.values()) < found.num_candidates


def test_the_best_is_the_best_of_all() -> None:
    """Against simulating everything."""
    space = Space(
        tensor_model_parallel_size=(1,),
        context_parallel_size=(1,),
        pipeline_model_parallel_size=(8, 16),
        expert_model_parallel_size=(64,),
        micro_batch_size=(1,),
        schedule=(("dualpipe", 1), ("dualpipev", 1), ("1f1b", 1)),
        recompute_modules=(("layernorm", "mla_up_proj"), ("layernorm", "mla_up_proj", "mlp")),
        last_stage_extra=(2, 3),
    )
    few = search(JOB, H800, COUNTS, space, num_best=1)
    every = search(JOB, H800, COUNTS, space, num_best=10**6)
    assert few.best[0][0].step_s == every.best[0][0].step_s
    assert few.num_simulated < every.num_simulated == len(every.best)


@pytest.mark.slow
def test_ten_thousand_candidates_in_a_minute() -> None:
    space = Space(tensor_model_parallel_size=(1,))
    begun = time.process_time()
    found = search(JOB, H800, COUNTS, space)
    seconds = time.process_time() - begun
    print(
        f"{found.num_candidates} candidates, {found.num_simulated} simulated, {seconds:.1f} s of processor time"
    )
    assert found.num_candidates >= 10_000
    assert seconds / found.num_candidates * 10_000 < 60
    reasons = found.refused
    assert reasons["memory"][0] > 1000 and "GiB of" in reasons["memory"][1]


def test_no_row_stands_twice() -> None:
    """Two caps that nothing reaches deal one table; one that is reached, another, which its row names."""
    space = Space(
        tensor_model_parallel_size=(1,),
        context_parallel_size=(1,),
        pipeline_model_parallel_size=(8,),
        expert_model_parallel_size=(64,),
        micro_batch_size=(1,),
        schedule=(("zigzag", 2),),
        zigzag_caps=(1.0, 4.0, 5.0),
        recompute_modules=(("layernorm", "mla_up_proj"),),
        last_stage_extra=(3,),
    )
    job = replace(JOB, global_batch_size=4096)
    found = search(job, replace(H800, memory=1e15), COUNTS, space, num_best=10)
    rows = [_row(*entry) for entry in found.best]
    assert found.num_simulated == 3 and len(rows) == len(set(rows)) == 2
    assert sum("memory_cap" in row for row in rows) == 1
    assert found.refused["the same as another (its table is)"][0] == 1


def test_every_refusal_has_its_example() -> None:
    space = Space(pipeline_model_parallel_size=(1,), schedule=(("dualpipe", 1),), micro_batch_size=(1,))
    found = search(JOB, H800, COUNTS, space, num_best=1)
    example = found.refused["one pipeline rank has no schedule"][1]
    assert example.endswith("use schedule=1f1b with PP1")
    assert not [text for _, text in found.refused.values() if text.rstrip().endswith(":")]
