"""A plan for people: summary, memory of each pipeline rank, and what would make it fit."""

from dataclasses import replace

from dsv3_megatron.checkpoint.host_memory import HostMemory, problem
from dsv3_megatron.plan.confidence import confidence, verdict
from dsv3_megatron.plan.dispatchers import dispatch_line
from dsv3_megatron.plan.job import Job, Layout, PlanError
from dsv3_megatron.plan.memory import GIB, plan_memory
from dsv3_megatron.plan.parameters import ParameterCounts
from dsv3_megatron.plan.step import Plan, schedule_of


def as_dict(plan: Plan) -> dict[str, object]:
    """The contract of `output=json`; `memory_gib` has one number per pipeline rank."""
    return {
        "step_s": plan.step_s,
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "gpu_hours_per_1t": plan.gpu_hours(1e12),
        "days_per_1t": plan.days(1e12),
        "bubble_s": plan.bubble_s,
        "memory_gib": plan.memory_gib,
        "fits": plan.fits,
        "memory_margin_gib": plan.memory_margin_gib,
        "confidence": confidence(plan.job, plan.gpu).as_dict(),
    }


def _sizes(layout: Layout) -> str:
    shared = f" ETP{layout.etp}" if layout.etp > 1 else ""
    return f"TP{layout.tp} CP{layout.cp} PP{layout.pp} EP{layout.ep}{shared}"


def summary(plan: Plan) -> str:
    """One line per figure."""
    job, layout, update = plan.job, plan.job.layout, plan.update
    costs = plan.costs
    middle = len(job.stages) // 2
    rows = [
        ("job", f"{layout.num_gpus} × {plan.gpu.name}, {_sizes(layout)}"),
        ("", f"{layout.schedule}, {job.num_microbatches} microbatches of {job.micro_batch_size}"),
        ("", f"{job.precision.name}, recompute "
             f"{', '.join(sorted(job.recompute)) or 'nothing'}, load imbalance {job.load_imbalance:g}"),
        *([("dispatch", dispatch_line(job, plan.gpu))] if layout.expert_ranks > 1 else []),
        ("step", f"{plan.step_s:.3f} s"),
        ("  pipeline", f"{plan.simulation.makespan:.3f} s, of which a rank is idle {plan.bubble_s:.3f} s (mean)"),
        ("  gradients, optimizer, parameters",
         f"{update.seconds:.3f} s not hidden ({update.gradient_reduce:.3f}, {update.optimizer:.3f}, "
         f"{update.parameter_gather:.3f})"),
        ("stage in the middle", "F {:.1f}, B {:.1f}, W {:.1f}, F&B {:.1f} ms".format(
            *(1e3 * costs.per_stage(name, len(job.stages))[middle] for name in ("f", "b", "w", "fb")))),
        ("rank 0", f"idle {plan.simulation.bubble[0]:.3f} s; mean " + ", ".join(
            f"{kind} {1e3 * seconds:.1f}" for kind, seconds in sorted(plan.unit_times(0).items())) + " ms"),
        ("tokens/s/GPU", f"{plan.tokens_per_s_per_gpu:.0f}"),
        ("confidence", str(confidence(job, plan.gpu))),
        ("1T tokens", f"{plan.gpu_hours(1e12) / 1e3:.1f}K GPU-hours, {plan.days(1e12):.2f} days"),
    ]  # fmt: skip
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def memory_table(plan: Plan) -> str:
    """GiB of each pipeline rank, part by part."""
    names = list(dict.fromkeys(name for rank in plan.memory for name in rank.parts))
    head = ["rank", "stages", *names, "peak"]
    schedule = plan.simulation.schedule
    rows = []
    for rank, memory in enumerate(plan.memory):
        stages = ",".join(str(stage) for stage, _ in schedule.stages_of(rank))
        parts = [f"{memory.parts.get(name, 0) / GIB:.1f}" for name in names]
        rows.append([str(rank), stages, *parts, f"{memory.peak / GIB:.1f}"])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    ]
    worst = max(plan.memory_gib)
    error = confidence(plan.job, plan.gpu).memory_percent
    lines.append(
        f"GiB; the fullest rank {verdict(plan)}: {worst:.1f} of {plan.gpu.memory / GIB:.1f}, "
        f"{plan.memory_margin_gib:.1f} left; peaks have been off by up to {error:.0f}%"
    )
    return "\n".join(lines)


def host_as_dict(host: HostMemory | None) -> dict[str, float]:
    """For `output=json`: GiB of a machine's own memory."""
    if host is None:
        return {}
    return {
        "host_save_gib": host.save / GIB,
        "host_load_gib": host.load / GIB,
        "host_average_gib": host.average / GIB,
        "host_optimizer_gib": host.optimizer / GIB,
    }


def host_lines(host: HostMemory, available: float | None) -> str:
    """One line."""
    always = f", {host.average / GIB:.0f} for the average of the weights" if host.average else ""
    always += f", {host.optimizer / GIB:.0f} for the offloaded optimizer" if host.optimizer else ""
    return (
        f"host memory of a machine: {host.save / GIB:.0f} GiB to save a checkpoint, {host.load / GIB:.0f} to load one"
        f"{always}" + ("" if available is None else f"; it has {available / GIB:.0f} GiB")
    )


def refuse_host_memory(host: HostMemory | None, available: float | None, memory_efficient: bool) -> None:
    """Raise PlanError where checkpoints do not fit a machine."""
    found = None if host is None or available is None else problem(host, available, memory_efficient)
    if found is not None:
        _, why, use = found
        raise PlanError(f"cluster.host_memory_gb={(available or 0) / 1e9:g}: {why}. Use {use}.")


def what_would_fit(plan: Plan, counts: ParameterCounts) -> list[str]:
    """Single changes of arguments, and their peaks, that make a plan fit that does not."""
    found = []
    for change, job in _changes(plan.job):
        try:
            memory = plan_memory(job, counts, schedule_of(job), plan.gpu)
        except PlanError:
            continue
        peak = max(rank.peak for rank in memory)
        if peak <= plan.gpu.memory:
            found.append(f"{change}: {peak / GIB:.1f} GiB")
    return found


def _changes(job: Job) -> list[tuple[str, Job]]:
    """In words and as jobs; only of modules that the model has."""
    modules = ["mla_up_proj", "layernorm"]
    choices = [modules, [*modules, "moe_act"], [*modules, "moe"]] if job.sizes.num_moe_layers else [modules]
    words = [
        "recompute_granularity=selective recompute_modules=[{}]".format(",".join(some)) for some in choices
    ]
    jobs = [replace(job, recompute=(job.recompute - {"full"}).union(some)) for some in choices]
    changes = list(zip(words, jobs, strict=True))
    at = min(1, len(choices) - 1)  # with SwiGLU's output computed again, as the recipe does
    fp8 = replace(job.precision, fp8=True, fp8_caches=True, fp8_dispatch=True)
    changes.insert(at + 1, (f"{words[at]} precision=fp8_dsv3", replace(jobs[at], precision=fp8)))
    full = "recompute_granularity=full recompute_method=uniform recompute_num_layers=1"
    whole = replace(job, recompute=frozenset({"full"}), recompute_layers=None, recompute_together=1)
    changes.append((full, whole))
    ep = job.layout.ep * 2
    if (
        job.sizes.num_moe_layers
        and job.sizes.num_moe_experts % ep == 0
        and job.layout.num_gpus % (job.layout.pp * ep) == 0
    ):
        changes.append((f"expert_model_parallel_size={ep}", replace(job, layout=replace(job.layout, ep=ep))))
    if job.micro_batch_size > 1:
        changes.append(("micro_batch_size=1", replace(job, micro_batch_size=1)))
    return changes
