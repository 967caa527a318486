"""Schedules side by side for one job: on the same devices, and with the same stages."""

from dataclasses import replace

from dsv3_megatron.pipeline.build import INTERLEAVED, ZIGZAG
from dsv3_megatron.pipeline.placement import layers_per_stage
from dsv3_megatron.plan.confidence import verdict
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, Layout, PlanError, Stage
from dsv3_megatron.plan.parameters import ParameterCounts
from dsv3_megatron.plan.step import Plan, plan

LAST_STAGE_EXTRA = 3  # as `placement.last_stage_extra` of the layouts of large models


def place(job: Job, num_stages: int, last_stage_extra: int = LAST_STAGE_EXTRA) -> tuple[Stage, ...]:
    """The job's layers on so many stages, as `pipeline_model_parallel_layout=auto` deals them out."""
    sizes = job.sizes
    num_dense = sizes.num_layers - sizes.num_moe_layers
    if num_stages == 1:
        return (Stage(num_dense, sizes.num_moe_layers, sizes.mtp_num_layers, embedding=True, head=True),)
    stages, first = [], 0
    counts = layers_per_stage(sizes.num_layers, num_stages, last_stage_extra)
    for index, count in enumerate(counts):
        dense = max(0, min(num_dense - first, count))
        last = index == num_stages - 1
        mtp = sizes.mtp_num_layers if last else 0
        stages.append(Stage(dense, count - dense, mtp, embedding=index == 0, head=last))
        first += count
    return tuple(stages)


def group_size(pp: int, num_microbatches: int) -> int:
    """The smallest group of microbatches with which Megatron's interleaved schedule takes this number of them."""
    sizes = range(pp, num_microbatches + 1)
    return next((g for g in sizes if num_microbatches % g == 0 or num_microbatches % g >= pp), pp)


def with_layout(job: Job, layout: Layout) -> Job:
    """The job on another layout, its layers dealt out anew."""
    placed = replace(job, layout=layout, stages=place(job, layout.num_stages))
    if layout.schedule != INTERLEAVED:
        return placed
    group = group_size(layout.pp, placed.num_microbatches)
    return replace(placed, layout=replace(layout, microbatch_group_size=group))


def variants(job: Job) -> list[tuple[str, Layout]]:
    """Schedules of the job's pipeline ranks, then of its number of stages on as many or half of the ranks."""
    layout = replace(job.layout, num_model_chunks=1)
    pp = layout.pp
    same = [(name, replace(layout, schedule=name)) for name in ("1f1b", "zb1p", "dualpipe", "dualpipev")] + [
        (f"{name}, {n} chunks", replace(layout, schedule=name, num_model_chunks=n))
        for name in (INTERLEAVED, ZIGZAG)
        for n in (2, 4)
    ]
    half = replace(layout, pp=pp // 2)
    stages = [
        (f"dualpipev on PP{pp // 2}", replace(half, schedule="dualpipev")),
        (f"{INTERLEAVED}, 2 chunks on PP{pp // 2}", replace(half, schedule=INTERLEAVED, num_model_chunks=2)),
        (f"{ZIGZAG}, 2 chunks on PP{pp // 2}", replace(half, schedule=ZIGZAG, num_model_chunks=2)),
    ]
    return same + (stages if pp > 2 else [])


def comparison(job: Job, gpu: Gpu, counts: ParameterCounts) -> str:
    """As Markdown: every variant on the same devices and global batch."""
    lines = [
        f"Schedules on the same {job.layout.num_gpus} GPUs and batch; last, with the job's {job.layout.num_stages} "
        "stages on half the pipeline ranks\n",
        "| schedule | stages | step, s | idle, s | tokens/s/GPU | peak, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, layout in variants(job):
        try:
            result: Plan = plan(with_layout(job, layout), gpu, counts)
        except (PlanError, ValueError) as error:
            lines.append(f"| {name} | {layout.num_stages} | none: {str(error).split(';')[0]} | | | |")
            continue
        peak = max(result.memory_gib)
        said = verdict(result)
        said = "" if said == "fits" else f" ({said})"
        lines.append(
            f"| {name} | {layout.num_stages} | {result.step_s:.2f} | {result.bubble_s:.2f} | "
            f"{result.tokens_per_s_per_gpu:.0f} | {peak:.1f}{said} |"
        )
    return "\n".join(lines)
