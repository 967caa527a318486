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

from dsv3_megatron.balance.plan import Plan, make_plan, max_over_mean
from dsv3_megatron.errors import RefusedArgument, exits_cleanly

OUTPUTS = ("json", "table", "png")


@exits_cleanly
def main(words: Sequence[str] | None = None) -> None:
    """Show what the words ask for; RefusedArgument for a wrong one."""
    given = list(sys.argv[1:] if words is None else words)
    named = [word for word in given if word.startswith("output=")]
    output = named[-1].partition("=")[2] if named else "table"
    options = _parser().parse_args([word for word in given if word not in named])
    if output not in OUTPUTS:
        raise RefusedArgument(f"output={output}: use output={' or output='.join(OUTPUTS)}")
    load, logged_groups = read_load(options.load, options.last)
    experts = len(next(iter(load.values())))
    groups = options.groups if options.groups is not None else logged_groups
    replicas = options.replicas if options.replicas is not None else experts
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

        draw(plan, options.file)
        print(options.file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    parser.add_argument(
        "--file", type=Path, default=Path("balance.png"), help="picture (default balance.png)"
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count: give 1 or more")
    return number


def read_load(path: Path, last: int | None = None) -> tuple[dict[int, list[float]], int]:
    """Tokens of each expert, layers by number, summed over the last records of a `metrics.jsonl`; expert groups.

    Raises:
        RefusedArgument: the file is missing, is not such a file, or holds no loads.
    """
    try:
        lines = path.read_text().splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise RefusedArgument(f"--load {path}: {error.strerror or error}") from error
    except ValueError as error:  # a broken last line, another format
        raise RefusedArgument(f"--load {path}: not a metrics.jsonl of the trainer ({error})") from error
    wanted = [record for record in records if isinstance(record, dict) and record.get("layers")]
    total: dict[int, list[float]] = {}
    for record in wanted if last is None else wanted[-last:]:
        for number, figures in record["layers"].items():
            counts = figures.get("tokens_per_expert")
            if counts is None:
                raise RefusedArgument(
                    f"--load {path}: no tokens_per_expert in it: log with --tensorboard-dir and this version"
                )
            before = total.get(int(number), [0.0] * len(counts))
            if len(before) != len(counts):
                raise RefusedArgument(f"--load {path}: runs with different numbers of experts in one file")
            total[int(number)] = [a + b for a, b in zip(before, counts, strict=True)]
    if not total:
        raise RefusedArgument(
            f"--load {path}: no record with MoE layers: give the metrics.jsonl of an MoE run"
        )
    return dict(sorted(total.items())), int(wanted[-1].get("expert_groups") or 1)


def table(plan: Plan) -> str:
    """The fullest GPU over the mean, and the number of copied experts, per layer."""
    lines = [
        f"{plan.phy2log.shape[1]} slots on {plan.gpus} GPUs in {plan.nodes} nodes, {plan.groups} expert groups: "
        f"{'hierarchical' if plan.hierarchical else 'global'} policy",
        f"{'layer':>5}  {'max/mean before':>15}  {'after':>6}  {'experts copied':>14}  {'most copies':>11}",
    ]
    rows = zip(
        plan.layers, max_over_mean(plan.before), max_over_mean(plan.after), plan.logcnt.tolist(), strict=True
    )
    for number, before, after, counts in rows:
        copied = sum(count > 1 for count in counts)
        lines.append(f"{number:>5}  {before:>15.3f}  {after:>6.3f}  {copied:>14}  {max(counts):>11}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
