"""`dsv3 plan model=v3_671b layout=pp16_ep64 cluster=h800_2048`, `dsv3 plan --launch 'torchrun …'`."""

import json
import sys
from typing import TYPE_CHECKING

from dsv3_megatron.conf import compose
from dsv3_megatron.dryrun.start import start_megatron
from dsv3_megatron.errors import exits_cleanly
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.options import Options, parse

if TYPE_CHECKING:
    from dsv3_megatron.plan.from_config import Planned

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
  anchor=FILE                a measured run that corrects the planner; --proxy says what to measure
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
    from dsv3_megatron.plan import anchor, report, whatif
    from dsv3_megatron.plan.cost import cost_table
    from dsv3_megatron.plan.step import plan

    report.refuse_host_memory(planned.host, planned.host_available, planned.memory_efficient)
    changes = whatif.names_of(options.whatif) if options.whatif is not None else ()
    if options.proxy:
        words, why = anchor.proxy(planned.job, planned.gpu)
        print(f"measure: {why}\n  {' '.join(words)}")
        print(
            "then: dsv3 plan … anchor=FILE with "
            + '{"plan": [the words of the proxy], "step_s": its seconds}'
        )
        return
    gpu, anchored = planned.gpu, {}
    if options.anchor is not None:
        measured = anchor.read(options.anchor)
        small = planned_of(parse(measured.words))
        if small.gpu != gpu:
            raise PlanError(
                f"anchor={options.anchor}: measured on {small.gpu.name}, planned on {gpu.name}; use one GPU"
            )
        speed = anchor.speed_of(small.job, gpu, small.counts, measured.step_s)
        gpu, anchored = anchor.scaled(gpu, speed), {"anchored_speed": speed}
    result = plan(planned.job, gpu, planned.counts)
    changed = whatif.what_if(changes, planned.job, gpu, planned.counts)
    if options.pictures is not None:
        from dsv3_megatron.plan.pictures import write_all

        for line in write_all(result, options.pictures, options.measured):
            print(line, file=sys.stderr)
    if options.output == "json":
        told = {"whatif": {one.name: {"step_s": one.step_s, "reason": one.reason} for one in changed}}
        more = anchored | (told if changed else {})
        print(json.dumps(report.as_dict(result) | report.host_as_dict(planned.host) | more))
        return
    for note in planned.notes:
        print(f"note: {note}")
    for name, speed in anchored.items():
        print(
            f"{name.replace('_', ' ')}: everything is {speed:.3f} times as fast as the planner's table has it"
        )
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


if __name__ == "__main__":
    main()
