"""The memory model against live tensors of real steps, and its parts against what they must be."""

import dataclasses
import functools
import itertools

import pytest
import torch

from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.pipeline import build_schedule
from dsv3_megatron.pipeline.placement import layers_per_stage
from dsv3_megatron.plan.counting import counts_of
from dsv3_megatron.plan.job import Job, Layout, Precision, Stage
from dsv3_megatron.plan.memory import plan_memory
from dsv3_megatron.plan.parameters import ParameterCounts
from tests.dualpipe.common import ScheduledLayout, ScheduledProblem
from tests.harness import run_distributed
from tests.parallel import common
from tests.plan import measure

RECOMPUTE = (
    ("recompute_granularity", "selective"),
    ("recompute_modules", ("layernorm", "mla_up_proj")),
)
OVERRIDES = (("deallocate_pipeline_outputs", True),)  # as the trainer sets it
BOUND = 0.03


def _problem(recompute: bool, fp8: bool = False, dtype: torch.dtype = torch.float32) -> ScheduledProblem:
    overrides = OVERRIDES + (RECOMPUTE if recompute else ()) + ((("fp8_recipe", "dsv3"),) if fp8 else ())
    if dtype == torch.bfloat16:
        overrides += (("bf16", True),)
    return ScheduledProblem(
        num_sequences=16,
        seq_length=48,
        micro_batch_size=2,
        num_layers=8,
        dtype=dtype,
        overrides=overrides,
        ddp=(("grad_reduce_in_fp32", True),),
    )


def _weights(rank: int, world_size: int, problem: ScheduledProblem) -> tuple[list, ModelSizes]:
    from dsv3_megatron.dryrun.count import weights_of

    layout = common.Layout()
    layout.initialize()
    config = problem.config(dataclasses.replace(layout))
    chunks = common.build_chunks(config, problem)
    sizes = ModelSizes.from_config(config.transformer, config.vocab_size, problem.seq_length)
    return weights_of(chunks[0].module), sizes


@functools.cache
def _model() -> tuple[ParameterCounts, ModelSizes]:
    """Counts and sizes of the model, from its real modules."""
    plain = common.Problem(seq_length=48, num_layers=8)
    ((weights, sizes),) = run_distributed(_weights, 1, timeout=120, problem=plain)
    return counts_of(weights, [False] + [True] * 7), sizes


def _job(layout: ScheduledLayout | common.Layout, problem: ScheduledProblem) -> Job:
    _, sizes = _model()
    schedule = getattr(layout, "schedule", "1f1b")
    shape = Layout(num_gpus=layout.world_size, pp=layout.pp, schedule=schedule)
    if schedule == "zigzag":
        shape = dataclasses.replace(shape, num_model_chunks=layout.chunks, zigzag=layout.table)  # type: ignore[union-attr]
    counts = layers_per_stage(problem.num_layers, shape.num_stages)
    last = shape.num_stages - 1
    stages = tuple(
        Stage(dense=int(i == 0), moe=n - int(i == 0), mtp=int(i == last), embedding=i == 0, head=i == last)
        for i, n in enumerate(counts)
    )
    bytes_ = problem.dtype.itemsize
    return Job(
        sizes=sizes,
        layout=shape,
        stages=stages,
        global_batch_size=problem.num_sequences,
        micro_batch_size=problem.micro_batch_size,
        precision=Precision(
            compute=bytes_,
            fp8="fp8_recipe" in dict(problem.overrides),
            main_gradient=4,
            master=0,  # steps without optimizer
            moment=0,
        ),
        recompute=frozenset(dict(problem.overrides).get("recompute_modules", ())),
        transformer_impl="local",
    )


def _layout(schedule: str, pp: int) -> common.Layout:
    if schedule == "1f1b":
        decoders = layers_per_stage(8, pp)
        stages = [["decoder"] * n for n in decoders]
        stages[0].insert(0, "embedding")
        stages[-1] += ["mtp", "loss"]
        return common.Layout(world_size=pp, pp=pp, stages=tuple(map(tuple, stages)))
    return ScheduledLayout(world_size=pp, pp=pp, schedule=schedule)


def _predicted(layout: common.Layout, problem: ScheduledProblem) -> list[float]:
    job = _job(layout, problem)
    counts, _ = _model()
    schedule = build_schedule(
        job.layout.schedule, layout.pp, job.num_microbatches, **job.layout.table_options
    )
    return [rank.peak for rank in plan_memory(job, counts, schedule)]


def compare(
    schedule: str, pp: int, recompute: bool, fp8: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    layout = _layout(schedule, pp)
    problem = _problem(recompute, fp8, dtype)
    if schedule == "1f1b":
        fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(common.Problem)}
        measured = measure.run(layout, common.Problem(**fields), timeout=400)  # type: ignore[arg-type]
    else:
        measured = measure.run(layout, problem, timeout=400)
    predicted = _predicted(layout, problem)
    errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
    print(
        f"{schedule} pp={pp} recompute={recompute} fp8={fp8} {dtype}: {measured} {[f'{e:+.2%}' for e in errors]}"
    )
    assert max(map(abs, errors)) <= BOUND, (measured, predicted)


def _cases() -> list:
    """Every schedule, with and without recompute and FP8; a few of them by default, the others slow."""
    default = {
        ("1f1b", True, False),
        ("zb1p", False, False),
        ("dualpipe", True, False),
    }
    cases = []
    for case in itertools.product(("1f1b", "zb1p", "dualpipe", "dualpipev"), (False, True), (False, True)):
        schedule, recompute, fp8 = case
        name = f"{schedule}-{'recompute' if recompute else 'keep'}{'-fp8' if fp8 else ''}"
        cases.append(pytest.param(*case, id=name, marks=() if case in default else pytest.mark.slow))
    return cases


@pytest.mark.parametrize("schedule, recompute, fp8", _cases())
def test_peak_of_a_real_step_is_predicted(schedule: str, recompute: bool, fp8: bool) -> None:
    compare(schedule, 2, recompute, fp8)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_peak_of_a_real_bf16_step_is_predicted(recompute: bool, fp8: bool) -> None:
    compare("zb1p", 2, recompute, fp8, torch.bfloat16)
