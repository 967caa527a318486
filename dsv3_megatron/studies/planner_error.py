"""Predicted against published: `python -m dsv3_megatron.studies.planner_error` (`make bench-planner`)."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv3_megatron.pipeline import Costs, simulate
from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.anchor import scaled, speed_of
from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.calibration import trace_times, unit_times
from dsv3_megatron.plan.compare import comparison
from dsv3_megatron.plan.confidence import DEEPSEEK, Domain, domain_of, is_near, sizes_of
from dsv3_megatron.plan.cost import report_totals
from dsv3_megatron.plan.errors import Compared
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.job import Job
from dsv3_megatron.plan.memory import GIB
from dsv3_megatron.plan.operators import Operators
from dsv3_megatron.plan.published import ALL_TO_ALL_US, RUNS, Run
from dsv3_megatron.plan.stage_times import costs
from dsv3_megatron.plan.step import plan, schedule_of, update

H800 = GPUS["h800"]
TRAINING = replace(deepseek.JOB, load_imbalance=LOAD_IMBALANCE)


@dataclass(frozen=True)
class Row:
    """One line of a table; `kind`: "fit", "prediction" or a run's half; of memory "tensors" or "device"."""

    what: str
    unit: str
    published: float
    predicted: float
    kind: str
    note: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def deepseek_rows() -> list[Row]:
    """DeepSeek's own training. Its pair and its step were fitted; the rest follows from them."""
    result = plan(TRAINING, H800, deepseek.COUNTS)
    units = unit_times(H800, TRAINING)
    pair = trace_times(H800)["pair of 4 layers"]
    bubble = result.simulation.bubble[0]
    rows = [
        Row("pair of 4 MoE layers in the trace", "ms", deepseek.TRACE_PAIR_OF_4_LAYERS, pair, "fit"),
        Row("step", "s", deepseek.STEP_S, result.step_s, "fit"),
        Row("tokens/s/GPU", "", deepseek.TOKENS_PER_S_PER_GPU, result.tokens_per_s_per_gpu, "fit"),
        Row("1T tokens", "K GPU-hours", deepseek.GPU_HOURS_PER_1T / 1e3, result.gpu_hours(1e12) / 1e3, "fit"),
        Row("1T tokens", "days", deepseek.DAYS_PER_1T, result.days(1e12), "fit"),
        Row("bubble of rank 0", "s", deepseek.BUBBLE_S, bubble, "prediction", "Table 4 read as rank 0"),
        Row(
            "optimizer",
            "s",
            deepseek.OPTIMIZER_S,
            result.update.seconds,
            "prediction",
            "with gradients, parameters",
        ),
    ]
    for kind, ms in deepseek.UNIT_TIMES.items():
        how = "fit" if kind == "W" else "prediction"
        rows.append(Row(f"mean {kind} of rank 0", "ms", ms, units[kind], how, "I: input-only backward"))
    return rows


@dataclass(frozen=True)
class Judged:
    """A published run beside its plan.

    Attributes:
        time: of the step.
        memory: of the fullest rank at its peak, where it was published: its tensors, and all of the device's.
        filled: the planned peak over the GPU's memory.
    """

    run: Run
    time: Row
    memory: tuple[Row, ...]
    filled: float

    @property
    def domain(self) -> Domain:
        return domain_of(self.run.job, GPUS[self.run.gpu])

    @property
    def compared(self) -> Compared:
        """As `plan/errors.py` has it."""
        return Compared(self.domain, 100 * self.time.error, **sizes_of(self.run.job))


def judged() -> list[Judged]:
    """Every published run, planned."""
    found = []
    for run in RUNS:
        result = plan(run.job, GPUS[run.gpu], run.counts)
        note = f"{run.source}; assumed: {run.assumed}"
        time = Row(run.name, "s", run.step_s, result.step_s, run.half, note)
        memory = []
        if run.peak_gib is not None:
            allocated = max(rank.allocated for rank in result.memory) / GIB
            memory.append(Row(run.name, "GiB", run.peak_gib, allocated, "tensors"))
        if run.device_gib is not None:
            memory.append(Row(run.name, "GiB", run.device_gib, max(result.memory_gib), "device"))
        filled = max(result.memory_gib) * GIB / result.gpu.memory
        found.append(Judged(run, time, tuple(memory), filled))
    return found


def alike(one: Judged, other: Judged) -> bool:
    """Whether one run may anchor another: limited by the same, that is of its domain and size, with the same parts in
    CUDA graphs, overlapped or not, and its processes bound or not."""

    def limits(job: Job) -> tuple[object, ...]:
        software = job.software
        return software.graphs, job.whole_iteration_graph, job.layout.overlap_pairs, software.bound

    near = is_near(one.run.job, other.compared)
    return one.domain == other.domain and near and limits(one.run.job) == limits(other.run.job)


def anchors(rows: Sequence[Judged]) -> list[tuple[Judged, list[Judged]]]:
    """The first run of each kind, and the others, which it then predicts; each run once."""
    left = [row for row in rows if row.run.half != "apart" and row.run.job.software.fused_attention]
    found = []
    while left:
        first, *rest = left
        others = [row for row in rest if alike(first, row)]
        if others:
            found.append((first, others))
        left = [row for row in rest if row not in others]
    return found


def anchored_rows(rows: Sequence[Judged]) -> list[tuple[str, Judged, float]]:
    """Anchor, predicted run with its plain error, and its error when anchored."""
    found = []
    for anchor, others in anchors(rows):
        run = anchor.run
        gpu = scaled(GPUS[run.gpu], speed_of(run.job, GPUS[run.gpu], run.counts, run.step_s))
        for row in others:
            step = plan(row.run.job, gpu, row.run.counts).step_s
            found.append((run.name, row, step / row.run.step_s - 1))
    return found


def anchored_table(rows: Sequence[Judged]) -> str:
    """As Markdown."""
    lines = ["| anchored on | predicted | error before | anchored |", "|---|---|---|---|"]
    for name, row, error in anchored_rows(rows):
        lines.append(f"| {name} | {row.run.name} | {row.time.error:+.1%} | {error:+.1%} |")
    return "\n".join(lines)


def errors_module(rows: Sequence[Judged]) -> str:
    """The text of `plan/errors.py`: `python -m dsv3_megatron.studies.planner_error errors`."""
    own = plan(TRAINING, H800, deepseek.COUNTS).step_s / deepseek.STEP_S - 1
    compared = [(DEEPSEEK, Compared(domain_of(TRAINING, H800), 100 * own, **sizes_of(TRAINING)))]
    # What no other run is like says nothing of them, nor does a run of which too little is known.
    compared += [
        (r.run.name, r.compared) for r in rows if r.run.job.software.fused_attention and r.run.half != "apart"
    ]
    lines = [
        '"""Errors in percent, by published run: written by `python -m dsv3_megatron.studies.planner_error errors`."""',
        "",
        "from typing import NamedTuple",
        "",
        "",
        "class Compared(NamedTuple):",
        '    """Of one run: hardware, dispatcher, precision; predicted step against the published one; its sizes."""',
        "",
        "    domain: tuple[str, str, str]",
        "    percent: float",
        "    num_gpus: int",
        "    num_microbatches: int",
        "    hidden_size: int",
        "",
        "",
        "TIME_PERCENT: dict[str, Compared] = {",
    ]
    for name, run in compared:
        sizes = ", ".join(map(str, run[2:]))
        lines += [
            f"    {json.dumps(name)}: Compared(",
            f"        {_words(run.domain)}, {run.percent:.1f}, {sizes}",
            "    ),",
        ]
    lines += [
        "}",
        "# Of the fullest rank's peak: of its tensors, or of the device where that is published and further off.",
        "MEMORY_PERCENT: dict[str, float] = {",
    ]
    lines += [
        f"    {json.dumps(r.run.name)}: {100 * max((row.error for row in r.memory), key=abs):.1f},"
        for r in rows
        if r.memory
    ]
    lines += [
        "}",
        "# Planned peaks above what the GPU has, of runs that ran: by so much they are too high, or by more.",
        "RAN_PERCENT: dict[str, float] = {",
    ]
    lines += [f"    {json.dumps(name)}: {percent:.1f}," for name, percent in above_memory(rows)]
    return "\n".join([*lines, "}", ""])


def above_memory(rows: Sequence[Judged]) -> list[tuple[str, float]]:
    """Published runs whose planned peak is more than their GPU has; by how many percent, upwards."""
    return [(row.run.name, math.ceil(1000 * (row.filled - 1)) / 10) for row in rows if row.filled > 1]


def _words(domain: Sequence[str]) -> str:
    return "(" + ", ".join(json.dumps(part) for part in domain) + ")"


# Title and limit of each half.
HALVES: dict[str, tuple[str, float]] = {
    "fitted": ("Fitted half", 0.10),
    "judge": ("Judges: not fitted", 0.15),
    "opened": ("Opened once: not fitted, and unseen when the form was settled", 0.15),
    "apart": ("Apart: too little of them is published", 0.15),
}


def inside(row: Judged, rows: Sequence[Judged]) -> bool:
    """Whether a run is of the domain and near the size of one that had been seen before."""
    seen = [other for other in rows if other.run.half in ("fitted", "judge") and other.domain == row.domain]
    return any(is_near(row.run.job, other.compared) for other in seen)


def halves(rows: Sequence[Judged]) -> str:
    """The fitted half, the judges, and those opened once, apart; of these last which were inside of a domain."""
    parts = []
    for half, (title, limit) in HALVES.items():
        mine = [row for row in rows if row.run.half == half]
        groups = [(f"{title}: {_within(mine, limit)}", mine)]
        if half == "opened":
            near = [row for row in mine if inside(row, rows)]
            far = [row for row in mine if row not in near]
            groups = [
                (f"{title}, inside of a domain: {_within(near, limit)}", near),
                (f"{title}, outside of every domain: {_within(far, limit)}", far),
            ]
        for words, group in groups:
            lines = [words, "", "| what | domain | published | predicted | error |", "|---|---|---|---|---|"]
            lines += [
                f"| {r.run.name} | {r.domain} | {r.time.published:.4g} s | {r.time.predicted:.4g} s | "
                f"{r.time.error:+.1%} |"
                for r in group
            ]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _within(rows: Sequence[Judged], limit: float) -> str:
    return f"{sum(abs(row.time.error) <= limit for row in rows)} of {len(rows)} within {limit:.0%}"


def all_to_all_rows() -> list[Row]:
    """Dispatch alone, of Megatron's paper: the communication model without computation beside it.

    The published times are those of kernels (DeepEP's page on HybridEP has rates of kernels and of calls: a call takes
    0.12 to 0.21 ms more), so the latency of a call is left out.
    """
    rows = []
    for (gpu, ep), (dispatch, combine) in ALL_TO_ALL_US.items():
        layout = replace(deepseek.JOB.layout, ep=ep)
        job = replace(deepseek.JOB, layout=layout, dispatcher="flex", flex_backend="hybridep")
        kernel = replace(GPUS[gpu], achieved=replace(GPUS[gpu].achieved, latency=0))
        predicted = 1e6 * Operators(job, kernel).all_to_all(2.0)
        mean = (dispatch + combine) / 2
        rows.append(Row(f"{gpu} EP{ep}, mean of dispatch and combine", "us", mean, predicted, "prediction"))
    return rows


def steps_towards_the_whole() -> list[tuple[str, float]]:
    """What each part of the model adds to the step that the trace alone predicts: seconds, cumulative."""
    trace = replace(H800, watts=2 * H800.achieved.full_watts)
    balanced = deepseek.JOB
    table = schedule_of(balanced)
    middle = len(balanced.stages) // 2

    def uniform(stage_costs: Costs) -> Costs:
        numbers = (
            stage_costs.per_stage(name, len(balanced.stages))[middle] for name in ("f", "b", "w", "fb")
        )
        return Costs(*numbers)

    def makespan(job: Job, gpu, *, alike: bool = False, p2p: bool = True) -> float:
        stage_costs = costs(job, gpu)
        if alike:
            stage_costs = uniform(stage_costs)
        return simulate(table, stage_costs if p2p else replace(stage_costs, p2p=0)).makespan

    after = update(balanced, trace, deepseek.COUNTS, table).seconds
    return [
        ("the trace alone: 16 stages of 4 MoE layers, no messages", makespan(balanced, trace, alike=True)),
        ("+ uneven stages: dense layers, MTP, two passes of the head", makespan(balanced, trace, p2p=False)),
        ("+ messages between stages", makespan(balanced, trace)),
        ("+ gradients, optimizer, parameters", makespan(balanced, trace) + after),
        ("+ sustained clocks (fitted on W)", makespan(balanced, H800) + after),
        ("+ load imbalance and waiting for it (fitted on the step)", makespan(TRAINING, H800) + after),
    ]


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = ["| what | published | predicted | error | how |", "|---|---|---|---|---|"]
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        lines.append(
            f"| {row.what} | {row.published:.4g}{unit} | {row.predicted:.4g}{unit} | {row.error:+.1%} | {row.kind} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    runs = judged()
    if words == ["errors"]:
        print(errors_module(runs), end="")
        return
    own, exchange = deepseek_rows(), all_to_all_rows()
    memory = [row for run in runs for row in run.memory]
    if words == ["output=json"]:
        rows = [
            vars(row) | {"error": row.error} for row in (*own, *[r.time for r in runs], *memory, *exchange)
        ]
        print(json.dumps(rows))
        return
    print("DeepSeek-V3's own training, 2048 H800\n\n" + table(own))
    print("\nFrom the trace to the step\n")
    for what, seconds in steps_towards_the_whole():
        print(f"  {seconds:6.2f} s  {what}")
    print("\nOther published runs of DeepSeek-V3, seconds of a step\n\n" + halves(runs) + "\n")
    for row in runs:
        print(f"  {row.run.name}: {row.time.note}")
    print(
        "\nPeak of the fullest rank, none fitted: its tensors, or all of the device's memory\n\n"
        + table(memory)
    )
    print("\nOne published run as the anchor of another of its hardware\n\n" + anchored_table(runs))
    print("\nAll-to-all alone, BF16, 4096 tokens (arXiv 2603.07685, table 7, HybridEP)\n\n" + table(exchange))
    print("\nCost of DeepSeek-V3 (report, Table 1: 2664K, 119K, 5K, 2788K GPU-hours, $5.576M)\n")
    for phase, hours, money in report_totals(plan(TRAINING, H800, deepseek.COUNTS).gpu_hours(1e12)):
        print(f"  {phase:14} {hours:7.0f}K GPU-hours  ${money:.3f}M")
    print("\n" + comparison(TRAINING, H800, deepseek.COUNTS))


if __name__ == "__main__":
    main()
