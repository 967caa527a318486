"""`dsv3 plan model=v3_671b layout=pp16_ep64 cluster=h800_2048`, `dsv3 plan --launch 'torchrun …'`."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.conf import compose
from dsv3_megatron.dryrun.start import start_megatron
from dsv3_megatron.errors import exits_cleanly
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.options import Options, parse

if TYPE_CHECKING:
    from dsv3_megatron.plan.from_config import Planned
    from dsv3_megatron.plan.hardware import Gpu

USAGE = """usage: dsv3 plan [output=table|json] [NAME=VALUE ...]
       dsv3 plan --launch 'torchrun … LINE' [gpu=NAME nodes=N gpus_per_node=M]
       dsv3 plan --script FILE.sh [gpu=NAME …] [VARIABLE=VALUE ...]
       dsv3 plan serve layout=decode_tp4_dp80_ep320 …   (serving; dsv3 plan serve --help)

Predicts memory, time and cost of a training job without running it. NAME=VALUE: as in dsv3_megatron.train_hydra
(model=, layout=, cluster=, schedule=, precision=, and any argument). --launch, --script: any line of
Megatron's, with or without --spec dsv3, as it is. And:

  tokens=14.8e12 price=2.0   cost of a token budget, at dollars per GPU-hour
  load_imbalance=1.0         tokens of the fullest expert-parallel rank against the mean (1: forced balance)
  pictures=FOLDER            timeline (SVG, PNG, Chrome trace), memory by part and over time
  whatif=all                 what the hardware of the report's §3.5 would give; or names of it
  anchor=FILE                what corrects the planner: a measured step, a timeline of --profile-pipeline, the report
                             of make test-gpu; --proxy says what to measure
  software.NAME=VALUE        of the run's software what no argument says: te=2.9, bound=false, fused_attention=false, …
  measured=FILE              a timeline that --profile-pipeline wrote, laid over the predicted one

Compare layouts with python -m dsv3_megatron.plan.search."""


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:
        from dsv3_megatron.plan.serve.__main__ import main as serve

        return serve(argv[1:])
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return
    run(parse(argv))


def planned_of(options: Options) -> "Planned":
    """The job that the command line means, through all refusals; starts Megatron."""
    planned = _launched(options)
    if not options.software:
        return planned
    if planned.job.software.own_kernels:
        raise PlanError(
            f"software.{next(iter(options.software))}: schedule={planned.job.layout.schedule} is planned with "
            "DeepSeek's kernels, whose software is not known; use schedule=1f1b"
        )
    job, said = planned.job, dict(options.software)
    # Of layout and precision, for what Megatron's arguments refuse now or do not have.
    if (overlap := said.pop("overlap_pairs", None)) is not None:
        job = replace(job, layout=replace(job.layout, overlap_pairs=overlap))
    if (attention := said.pop("fp8_attention", None)) is not None:
        job = replace(job, precision=replace(job.precision, fp8_attention=attention))
    return replace(planned, job=replace(job, software=replace(job.software, **said)))


def _launched(options: Options) -> "Planned":
    cfg = compose(options.overrides) if options.launch is None and options.script is None else None
    start_megatron()
    from dsv3_megatron.plan.from_config import from_config, from_launch
    from dsv3_megatron.plan.launch import of_line, of_script

    if cfg is not None:
        return from_config(cfg, options.load_imbalance)
    if options.script is not None:
        return from_launch(of_script(options.script, options.said), options.load_imbalance)
    return from_launch(of_line(options.launch or "", options.said), options.load_imbalance)


def run(options: Options) -> None:
    """Plan and print."""
    planned = planned_of(options)
    from dsv3_megatron.plan import report, whatif
    from dsv3_megatron.plan.cost import cost_table
    from dsv3_megatron.plan.step import plan

    report.refuse_host_memory(planned.host, planned.host_available, planned.memory_efficient)
    changes = whatif.names_of(options.whatif) if options.whatif is not None else ()
    if options.proxy:
        print(_recipe(options, planned))
        return
    gpu, anchored = planned.gpu, dict[str, float]()
    if options.anchor is not None:
        gpu, anchored = _anchored(options.anchor, planned)
    result = plan(planned.job, gpu, planned.counts)
    changed = whatif.what_if(changes, planned.job, gpu, planned.counts)
    if options.pictures is not None:
        from dsv3_megatron.plan.pictures import write_all

        for line in write_all(result, options.pictures, options.measured):
            print(line, file=sys.stderr)
    if options.output == "json":
        told = {"whatif": {one.name: {"step_s": one.step_s, "reason": one.reason} for one in changed}}
        more = anchored | (told if changed else {})
        for note in planned.notes:
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps(report.as_dict(result) | report.host_as_dict(planned.host) | more))
        return
    for note in planned.notes:
        print(f"note: {note}")
    for name, speed in anchored.items():
        what = "everything" if name == "anchored_speed" else name.removeprefix("anchored_")
        print(f"anchored: {what} is {speed:.3f} times as fast as the planner's table has it")
    print(report.summary(result))
    print(f"\n{report.memory_table(result)}")
    if planned.host is not None:
        print(report.host_lines(planned.host, planned.host_available))
    if not result.fits:
        fitting = report.what_would_fit(result, planned.counts)
        print("what would make it fit:")
        for change in fitting or ["no single change of recompute, precision or expert parallelism"]:
            print(f"  {change}")
    if changed:
        print(f"\n{whatif.table(changed, result.step_s)}")
    if options.tokens is not None:
        print(f"\n{cost_table(result, options.tokens, options.price)}")


def _anchored(path: Path, planned: "Planned") -> tuple["Gpu", dict[str, float]]:
    """The job's hardware with what was measured, and how much faster that is than the table."""
    from dsv3_megatron.plan import anchor

    gpu, measured = planned.gpu, anchor.read(path)
    if isinstance(measured, anchor.Speeds):
        gpu, ratios = anchor.with_speeds(path, measured, gpu)
        return gpu, {f"anchored_{name}": ratio for name, ratio in ratios.items()}
    small = planned if measured.words is None else planned_of(parse(measured.words))
    if small.gpu != gpu:
        raise PlanError(f"anchor={path}: measured on {small.gpu.name}, planned on {gpu.name}; use one GPU")
    if measured.step_s is None:
        speed = anchor.speed_of_timeline(path, small.job, gpu, small.counts, measured.timeline)
    else:
        speed = anchor.speed_of(small.job, gpu, small.counts, measured.step_s)
    return anchor.scaled(gpu, speed), {"anchored_speed": speed}


def _recipe(options: Options, planned: "Planned") -> str:
    """What to measure, as words of this command and of the trainer."""
    from dsv3_megatron.plan import proxy

    recipe = proxy.proxy(planned.job, planned.gpu)
    if options.launch is not None or options.script is not None:
        how = f"  the line, without {', '.join(proxy.LEFT_OUT)}, on one node and with\n  {proxy.options(recipe)}"
        file = '{"launch": that line, "gpu": "' + planned.gpu.name + '", "step_s": its seconds}'
    else:
        words = proxy.overrides(recipe, options.overrides)
        how = "  " + " ".join(map(shlex.quote, words))
        file = json.dumps({"plan": words, "step_s": "its seconds"})
    return f"measure: {recipe.why}\n{how}\nthen: dsv3 plan … anchor=FILE, with FILE\n  {file}"


if __name__ == "__main__":
    main()
