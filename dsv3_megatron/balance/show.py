"""A plan for redundant experts from the loads that a training run has logged.

    dsv3 balance --load runs/demo/tensorboard/metrics.jsonl --gpus 32 --nodes 4 --replicas 288 output=table

`output`: `json` (the last line), `table` (one line per layer), or `png` (the load of each GPU before and after, written
to --file). --load is a `metrics.jsonl` of the trainer (docs/metrics.md); its last --last records are added up.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dsv3_megatron.balance.logged import read_load
from dsv3_megatron.balance.plan import Plan, make_plan, max_over_mean
from dsv3_megatron.errors import RefusedArgument, exits_cleanly

OUTPUTS = ("json", "table", "png")
_MOST = 1_000_000  # of GPUs, slots and so on: more than there are, few enough to be dealt out


@exits_cleanly
def main(words: Sequence[str] | None = None) -> None:
    """Show what the words ask for; RefusedArgument for a wrong one."""
    given = list(sys.argv[1:] if words is None else words)
    named = [word for word in given if word.startswith("output=")]
    output = named[-1].partition("=")[2] if named else "table"
    options = _parser().parse_args([word for word in given if word not in named])
    if output not in OUTPUTS:
        raise RefusedArgument(f"output={output}: use output={' or output='.join(OUTPUTS)}")
    if options.file is not None and output != "png":
        raise RefusedArgument(
            f"--file {options.file}: output={output} goes to the terminal: use output=png or no --file"
        )
    picture = _picture(options.file)
    load, groups = read_load(options.load, options.last, options.groups)
    experts = len(next(iter(load.values())))
    replicas = options.replicas if options.replicas is not None else experts
    if options.gpus % options.nodes:
        raise RefusedArgument(
            f"--nodes {options.nodes}: {options.gpus} GPUs do not lie evenly on them: use a divisor of --gpus"
        )
    if replicas > experts * options.gpus:
        raise RefusedArgument(
            f"--replicas {replicas}: more than a copy of each of {experts} experts on each of {options.gpus} GPUs: "
            f"use {experts * options.gpus} or fewer"
        )
    try:
        plan = make_plan(load, replicas, groups, options.nodes, options.gpus)
    except ValueError as error:
        wrong = f"--gpus {options.gpus} --nodes {options.nodes} --replicas {replicas} --groups {groups}"
        raise RefusedArgument(f"{wrong}: {error}") from error
    if output == "json":
        print(json.dumps(plan.as_dict()))
    elif output == "table":
        print(table(plan))
    else:
        from dsv3_megatron.balance.picture import draw

        try:
            draw(plan, picture)
        except OSError as error:
            raise RefusedArgument(f"--file {picture}: {error.strerror or error}") from error
        print(picture)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dsv3 balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="dsv3 balance --load FILE --gpus N [--nodes N] [--replicas N] [output=json|table|png]",
    )
    parser.add_argument("--load", type=Path, required=True, help="metrics.jsonl of a training run")
    parser.add_argument("--gpus", type=_count, required=True, help="GPUs that share the experts of a layer")
    parser.add_argument("--nodes", type=_count, default=1, help="machines they are in (default 1)")
    parser.add_argument("--replicas", type=_count, help="slots of all GPUs together (default: no copies)")
    parser.add_argument("--groups", type=_count, help="expert groups of the router (default: as logged)")
    parser.add_argument("--last", type=_count, help="records to add up, from the end (default: all)")
    parser.add_argument("--file", type=Path, help="the picture of output=png (default balance.png)")
    return parser


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and text.strip("0")):
        raise argparse.ArgumentTypeError(f"{text} is not a count: give 1 or more")
    digits = text.lstrip("0")
    if len(digits) > len(str(_MOST)) or int(digits) > _MOST:
        raise argparse.ArgumentTypeError(f"{text[:20]} is too many: give {_MOST} or fewer")
    return int(digits)


def _picture(said: Path | None) -> Path:
    """Where the picture goes; refused before anything is read or drawn."""
    path = Path("balance.png") if said is None else said
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise RefusedArgument(f"--file {path}: {error.strerror or error}") from error
    if path.suffix.lower() != ".png" or is_folder:
        raise RefusedArgument(f"--file {path}: the picture is a PNG: give a name that ends in .png")
    return path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RefusedArgument(f"{message} (all options: dsv3 balance --help)")


def table(plan: Plan) -> str:
    """The fullest GPU over the mean, and the number of copied experts, per layer."""
    lines = [
        f"{plan.phy2log.shape[1]} slots on {plan.gpus} GPUs in {plan.nodes} nodes, {plan.groups} expert groups: "
        f"{'hierarchical' if plan.hierarchical else 'global'} policy",
        f"{'layer':>5}  {'max/mean before':>15}  {'after':>6}  {'experts copied':>14}  {'most copies':>11}",
    ]
    rows = list(
        zip(
            plan.layers,
            max_over_mean(plan.before),
            max_over_mean(plan.after),
            plan.logcnt.tolist(),
            strict=True,
        )
    )
    for number, before, after, counts in rows:
        copied = sum(count > 1 for count in counts)
        lines.append(f"{number:>5}  {before:>15.3f}  {after:>6.3f}  {copied:>14}  {max(counts):>11}")
    fuller = [str(number) for number, before, after, _ in rows if after > before * (1 + 1e-6)]
    if fuller:
        lines.append(
            f"layer {', '.join(fuller)}: better as before; the published packing is greedy (docs/balance.md)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
