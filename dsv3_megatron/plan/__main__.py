"""`dsv3 plan model=v3_671b layout=pp16_ep64 cluster=h800_2048`, `dsv3 plan --launch 'torchrun …'`."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.conf import compose
from dsv3_megatron.dryrun.start import start_megatron
from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.options import Options, beside_job, parse

if TYPE_CHECKING:
    from dsv3_megatron.plan.from_config import Planned
    from dsv3_megatron.plan.hardware import Gpu
    from dsv3_megatron.plan.proxy import Proxy

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
    for name in ("fp8_attention", "norm_quantises"):
        if options.software.get(name) and not job.precision.fp8:
            raise PlanError(f"software.{name}=true: the job has no FP8 ({job.precision.name}); leave it out")
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
    if options.pictures is not None:
        from dsv3_megatron.plan.pictures import make_place

        make_place(options.pictures, options.measured)
    planned = planned_of(options)
    from dsv3_megatron.plan import report, whatif
    from dsv3_megatron.plan.cost import cost, cost_table
    from dsv3_megatron.plan.deepseek import DOLLARS_PER_GPU_HOUR
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
    price = DOLLARS_PER_GPU_HOUR if options.price is None else options.price
    if options.pictures is not None:
        from dsv3_megatron.plan.pictures import write_all

        for line in write_all(result, options.pictures, options.measured):
            print(line, file=sys.stderr)
    if options.output == "json":
        more: dict[str, object] = dict(anchored)
        if changed:
            more["whatif"] = {one.name: {"step_s": one.step_s, "reason": one.reason} for one in changed}
        if options.tokens is not None:
            more["cost"] = cost(result, options.tokens, price)
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
        print(f"\n{cost_table(result, options.tokens, price)}")


def _anchored(path: Path, planned: "Planned") -> tuple["Gpu", dict[str, float]]:
    """The job's hardware with what was measured, and how much faster that is than the table."""
    from dsv3_megatron.plan import anchor

    gpu, measured = planned.gpu, anchor.read(path)
    if isinstance(measured, anchor.Speeds):
        gpu, ratios = anchor.with_speeds(path, measured, gpu)
        return gpu, {f"anchored_{name}": ratio for name, ratio in ratios.items()}
    try:  # whatever is wrong with its job is wrong in this file
        small = planned if measured.words is None else _measured_job(measured.words)
        if small.gpu != gpu:
            raise PlanError(f"measured on {small.gpu.name}, planned on {gpu.name}; use one GPU")
        if measured.step_s is None:
            speed = anchor.speed_of_timeline(path, small.job, gpu, small.counts, measured.timeline)
        else:
            speed = anchor.speed_of(small.job, gpu, small.counts, measured.step_s)
    except RefusedArgument as error:
        why = str(error).removeprefix(f"anchor={path}: ").removeprefix("anchor: ")
        raise PlanError(f"anchor={path}: {why}") from error
    return anchor.scaled(gpu, speed), {"anchored_speed": speed}


def _measured_job(words: Sequence[str]) -> "Planned":
    """Of an anchor's own words, which describe a job and nothing else."""
    options = parse(words)
    if others := beside_job(options):
        raise PlanError(
            f"{', '.join(others)} among the words of the measured job, where it does nothing; leave it out"
        )
    return planned_of(options)


def _recipe(options: Options, planned: "Planned") -> str:
    """What to measure, as words of this command and of the trainer."""
    from dsv3_megatron.plan import proxy

    recipe = _fitting(options, planned)
    if options.launch is not None or options.script is not None:
        nodes = "one node" if recipe.nodes == 1 else f"{recipe.nodes} nodes"
        how = (
            f"  the line, without {', '.join(proxy.LEFT_OUT)}, on {nodes} and with\n  {proxy.options(recipe)}"
        )
        said = "".join(
            f", {json.dumps(name)}: {json.dumps(value)}"
            for name, _, value in (word.partition("=") for word in options.of_run)
        )
        file = '{"launch": that line, "gpu": "' + planned.gpu.name + f'"{said}, "step_s": its seconds}}'
    else:
        words = proxy.overrides(recipe, options.overrides)
        how = "  " + " ".join(map(shlex.quote, words))
        file = json.dumps({"plan": [*words, *options.of_run], "step_s": "its seconds"})
    return f"measure: {recipe.why}\n{how}\nthen: dsv3 plan … anchor=FILE, with FILE\n  {file}"


def _fitting(options: Options, planned: "Planned") -> "Proxy":
    """The first recipe that can be planned, as it is printed, and fits.

    Raises:
        PlanError: there is none.
    """
    from dsv3_megatron.plan import proxy
    from dsv3_megatron.plan.parameters import counts_of_sizes
    from dsv3_megatron.plan.step import plan

    result = None
    for recipe in proxy.recipes(planned.job, planned.gpu):
        job = proxy.small_job(planned.job, recipe)
        result = plan(job, planned.gpu, counts_of_sizes(job.sizes, job.layout.tp))
        if result.fits and options.launch is None and options.script is None:
            words = [*proxy.overrides(recipe, options.overrides), *options.of_run]
            try:
                small = planned_of(parse(words))
            except RefusedArgument as error:
                raise PlanError(f"--proxy: the job that it would measure is refused: {error}") from error
            result = plan(small.job, small.gpu, small.counts)
        if result.fits:
            return recipe
    peak = 0.0 if result is None else max(result.memory_gib)
    raise PlanError(
        f"--proxy: its smallest job takes {peak:.1f} GiB of {planned.gpu.name}'s {planned.gpu.memory / 2**30:.1f}; "
        "spread the experts or the tensors over more ranks, or recompute more"
    )


if __name__ == "__main__":
    main()
