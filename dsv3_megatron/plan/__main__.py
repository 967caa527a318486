"""`dsv3 plan model=v3_671b layout=pp16_ep64 cluster=h800_2048`, `dsv3 plan --launch 'torchrun …'`."""

import json
import sys
from typing import TYPE_CHECKING

from dsv3_megatron.conf import compose
from dsv3_megatron.dryrun.start import start_megatron
from dsv3_megatron.errors import exits_cleanly
from dsv3_megatron.plan.options import Options, parse

if TYPE_CHECKING:
    from dsv3_megatron.plan.from_config import Planned

USAGE = """usage: dsv3 plan [output=table|json] [NAME=VALUE ...]
       dsv3 plan --launch 'torchrun … LINE' [gpu=NAME nodes=N gpus_per_node=M]
       dsv3 plan --script FILE.sh [gpu=NAME …] [VARIABLE=VALUE ...]

Predicts memory, time and cost of a training job without running it. NAME=VALUE: as in dsv3_megatron.train_hydra
(model=, layout=, cluster=, schedule=, precision=, and any argument). --launch, --script: any line of
Megatron's, with or without --spec dsv3, as it is. And:

  tokens=14.8e12 price=2.0   cost of a token budget, at dollars per GPU-hour
  load_imbalance=1.0         tokens of the fullest expert-parallel rank against the mean (1: forced balance)
  pictures=FOLDER            timeline (SVG, PNG, Chrome trace), memory by part and over time
  measured=FILE              a timeline that --profile-pipeline wrote, laid over the predicted one

Compare layouts with python -m dsv3_megatron.plan.search."""


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
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
    from dsv3_megatron.plan import report
    from dsv3_megatron.plan.cost import cost_table
    from dsv3_megatron.plan.step import plan

    report.refuse_host_memory(planned.host, planned.host_available, planned.memory_efficient)
    result = plan(planned.job, planned.gpu, planned.counts)
    if options.pictures is not None:
        from dsv3_megatron.plan.pictures import write_all

        for line in write_all(result, options.pictures, options.measured):
            print(line, file=sys.stderr)
    if options.output == "json":
        print(json.dumps(report.as_dict(result) | report.host_as_dict(planned.host)))
        return
    for note in planned.notes:
        print(f"note: {note}")
    print(report.summary(result))
    print(f"\n{report.memory_table(result)}")
    if planned.host is not None:
        print(report.host_lines(planned.host, planned.host_available))
    if not result.fits:
        changes = report.what_would_fit(result, planned.counts)
        print("what would make it fit:")
        for change in changes or ["no single change of recompute, precision or expert parallelism"]:
            print(f"  {change}")
    if options.tokens is not None:
        print(f"\n{cost_table(result, options.tokens, options.price)}")


if __name__ == "__main__":
    main()
