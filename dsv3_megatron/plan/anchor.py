"""Something measured corrects the planner: `dsv3 plan … anchor=FILE`.

FILE is one of three:

1. One measured run, of a small proxy (`proxy.py`) or of any job: `{"plan": [words of dsv3 plan], "step_s": seconds}`,
   or with `"launch": line` and what `dsv3 plan --launch` takes beside it (`"gpu": name`). With `"timeline": FILE` in
   place of `"step_s"` the run is a timeline of another job than the planned one.
2. A timeline that `--profile-pipeline` wrote, of the job that is planned.
3. The report of `make test-gpu` (report.json), with the speeds of copies and products on that GPU.

A run is planned too; achieved fractions and the host's speed of its hardware are scaled by one number, with which its
plan takes the measured time. A report's speeds take the place of the table's.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from dsv3_megatron.pipeline.simulate import Event
from dsv3_megatron.pipeline.trace import read_trace
from dsv3_megatron.plan.hardware import GPUS, Achieved, Gpu
from dsv3_megatron.plan.job import Job, PlanError
from dsv3_megatron.plan.parameters import ParameterCounts
from dsv3_megatron.plan.step import plan

# What is seconds, SMs or a property of the chip, no speed.
_NO_SPEED = (
    "latency",
    "ramp",
    "beside_token",
    "pair_gap",
    "communication_sms",
    "flops_per_clock",
    "tile",
    "full_watts",
)
SLOWEST, FASTEST = 0.25, 4.0
WANTED = (
    '{"plan": ["model=…", …], "step_s": 1.23}, {"launch": "torchrun …", "gpu": "h100", "step_s": 1.23}, a timeline of '
    "--profile-pipeline, or the report.json of make test-gpu"
)


@dataclass(frozen=True)
class Measured:
    """A measured run.

    Attributes:
        words: of `dsv3 plan`, that describe the measured job; None: it is the planned one.
        step_s: seconds of one of its steps, None with a timeline.
        timeline: what its pipeline ranks did, in seconds.
    """

    words: tuple[str, ...] | None
    step_s: float | None = None
    timeline: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Speeds:
    """What a GPU's report says.

    Attributes:
        gpu: a name of the hardware table.
        hbm: bytes/s of a copy, read and written.
        bf16, fp8: FLOP/s of products, geometric mean of the shapes; `fp8` None where they were not run.
    """

    gpu: str
    hbm: float
    bf16: float
    fp8: float | None


def read(path: Path) -> Measured | Speeds:
    """PlanError says what the file lacks."""
    try:
        said: Any = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise PlanError(f"anchor={path}: cannot be read ({error}); use {WANTED}") from error
    if not isinstance(said, dict):
        raise PlanError(f"anchor={path}: holds no measurement; use {WANTED}")
    if "traceEvents" in said:
        return Measured(None, timeline=_timeline(path, path))
    if "steps" in said and "device" in said:
        return _speeds(path, said)
    _refuse_keys(path, said)
    if isinstance(said.get("plan"), list):
        words = tuple(map(str, said["plan"]))
    elif isinstance(said.get("launch"), str):
        beside = [
            f"{name}={value}" for name, value in said.items() if name not in ("launch", "step_s", "timeline")
        ]
        words = ("--launch", said["launch"], *beside)
    else:
        raise PlanError(f"anchor={path}: neither plan nor launch is there; use {WANTED}")
    if isinstance(said.get("timeline"), str):
        return Measured(words, timeline=_timeline(path, path.parent / said["timeline"]))
    seconds = said.get("step_s")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise PlanError(f"anchor={path}: step_s, positive seconds of a step, is not there; use {WANTED}")
    return Measured(words, float(seconds))


def _refuse_keys(path: Path, said: dict[str, Any]) -> None:
    """PlanError for a key that would do nothing; beside a launch line others describe its job (`options.py`)."""
    for one, other in (("plan", "launch"), ("step_s", "timeline")):
        if one in said and other in said:
            raise PlanError(f"anchor={path}: {one} and {other} are both there; leave one of them out")
    for key in said:
        if "plan" in said and key not in ("plan", "step_s", "timeline"):
            raise PlanError(
                f"anchor={path}: {key} is no key beside plan; say it among its words, or leave it out"
            )


def _timeline(path: Path, file: Path) -> tuple[Event, ...]:
    """The measured one of a trace."""
    try:
        return read_trace(file)["measured"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise PlanError(
            f"anchor={path}: {file} is no timeline of --profile-pipeline ({type(error).__name__}: {error})"
        ) from error


def _figures(path: Path, report: dict[str, Any]) -> list[tuple[str, Any]]:
    """All that its tests recorded."""
    try:
        tests = [test for step in report["steps"].values() for test in step.get("tests", ())]
        return [figure for test in tests for figure in test.get("figures", {}).items()]
    except (AttributeError, TypeError) as error:
        raise PlanError(f"anchor={path}: no report of make test-gpu ({error}); use {WANTED}") from error


def _speeds(path: Path, report: dict[str, Any]) -> Speeds:
    """Of a report of `tests/gpu`: figures that its tests recorded."""
    device = str(report["device"])
    names = [name for name in GPUS if name in device.lower().replace("-", " ").split()]
    if not names:
        raise PlanError(
            f"anchor={path}: a report of {device}, which the hardware table does not have (a rehearsal measures "
            f"nothing); use one of {', '.join(GPUS)}"
        )
    found: dict[str, list[float]] = {}
    for name, value in _figures(path, report):
        try:
            found.setdefault(name, []).append(float(value))
        except (TypeError, ValueError):
            continue  # words, such as "not measured"

    def of(name: str) -> float | None:
        values = [value for value in found.get(name, ()) if value > 0]
        return geometric_mean(values) if values else None

    copy, bf16, fp8 = of("copy_GB_per_s"), of("bf16_TFLOP_per_s"), of("scaled_mm_TFLOP_per_s")
    if copy is None or bf16 is None:
        raise PlanError(
            f"anchor={path}: the report has no speeds (copy_GB_per_s, bf16_TFLOP_per_s); run its stage of speeds, "
            "bash gpu_bundle/run.sh 2 or make test-gpu"
        )
    return Speeds(names[0], 1e9 * copy, 1e12 * bf16, None if fp8 is None else 1e12 * fp8)


# --- the hardware with it


def with_speeds(path: Path, speeds: Speeds, gpu: Gpu) -> tuple[Gpu, dict[str, float]]:
    """The GPU with a report's fractions in place of the table's, and how many times they are those.

    Raises:
        PlanError: of another GPU, or a speed above the peak.
    """
    if speeds.gpu != gpu.name:
        raise PlanError(f"anchor={path}: measured on {speeds.gpu}, planned on {gpu.name}; use one GPU")
    a = gpu.achieved
    shares = {"hbm": speeds.hbm / gpu.hbm, "bf16_gemm": speeds.bf16 / gpu.bf16}
    shares["fp8_gemm"] = (
        a.fp8_gemm * shares["bf16_gemm"] / a.bf16_gemm if speeds.fp8 is None else speeds.fp8 / gpu.fp8
    )
    for name, share in shares.items():
        if not 0.05 < share <= 1:
            raise PlanError(
                f"anchor={path}: {name} would be {share:.0%} of {gpu.name}'s peak; another GPU was measured, or it "
                "was busy"
            )
    return replace(gpu, achieved=replace(a, **shares)), {  # type: ignore[arg-type]
        name: share / getattr(a, name) for name, share in shares.items()
    }


def scaled(gpu: Gpu, speed: float) -> Gpu:
    """With all fractions, and the host, so many times as fast."""

    def times(value: Any) -> Any:
        return tuple(part * speed for part in value) if isinstance(value, tuple) else value * speed

    names = [field.name for field in fields(Achieved) if field.name not in _NO_SPEED]
    achieved = replace(gpu.achieved, **{name: times(getattr(gpu.achieved, name)) for name in names})
    host = gpu.host.slower(1 / speed)
    return replace(gpu, achieved=achieved, host=host)


def speed_of(job: Job, gpu: Gpu, counts: ParameterCounts, step_s: float) -> float:
    """The number by which a measured job is faster than its plan.

    Raises:
        PlanError: more than four times faster or slower: another job was measured.
    """

    def step(speed: float) -> float:
        return plan(job, scaled(gpu, speed), counts).step_s

    if not step(FASTEST) <= step_s <= step(SLOWEST):
        raise PlanError(
            f"anchor: the measured step of {step_s:g} s is more than {FASTEST:g} times off its plan, "
            f"{step(1.0):.3g} s: another job was measured, or another one is described"
        )
    return _bisect(step, step_s)


def speed_of_timeline(
    path: Path, job: Job, gpu: Gpu, counts: ParameterCounts, timeline: Sequence[Event]
) -> float:
    """The same from what the pipeline ranks did: the sum of all actions, without what they waited.

    Raises:
        PlanError: of another number of ranks or actions, or more than four times faster or slower.
    """

    def shape(events: Sequence[Event]) -> tuple[int, int]:
        return len({event.rank for event in events}), len(events)

    def busy(events: Sequence[Event]) -> float:
        return sum(event.end - event.start for event in events)

    planned, measured = shape(plan(job, gpu, counts).simulation.events), shape(timeline)
    if planned != measured:
        raise PlanError(
            f"anchor={path}: its timeline has {measured[0]} pipeline ranks and {measured[1]} actions, the planned job "
            f"{planned[0]} and {planned[1]}; plan the job that was measured, or name it: "
            '{"plan": [its words], "timeline": FILE}'
        )

    def seconds(speed: float) -> float:
        return busy(plan(job, scaled(gpu, speed), counts).simulation.events)

    wanted = busy(timeline)
    if not seconds(FASTEST) <= wanted <= seconds(SLOWEST):
        raise PlanError(
            f"anchor={path}: its actions take {wanted:.3g} s in all, more than {FASTEST:g} times off the plan's "
            f"{seconds(1.0):.3g} s; another job was measured"
        )
    return _bisect(seconds, wanted)


def _bisect(falling: Callable[[float], float], wanted: float) -> float:
    low, high = SLOWEST, FASTEST
    while high / low > 1.0005:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if falling(middle) > wanted else (low, middle)
    return (low * high) ** 0.5
