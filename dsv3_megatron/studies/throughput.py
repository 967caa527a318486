"""Training throughput of the demo's model under several schedules: `python -m dsv3_megatron.studies.throughput`.

    … --schedules dualpipe dualpipe+ema_decay=0.999       what an override costs

Whole trainers run one after the other, round by round (`1f1b` is Megatron's own schedule), so that a machine that
gets slower meets all of them. One JSON line per run on stdout, progress on stderr, and a last line with the ratio of
each schedule's median tokens/s to that of the first.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from dsv3_megatron.conf import compose
from dsv3_megatron.conf.check import world_size
from dsv3_megatron.demo.corpus import prepare_corpus
from dsv3_megatron.demo.launch import run_ranks
from dsv3_megatron.demo.results import TOKENS_PER_S, read_curves
from dsv3_megatron.demo.run import DemoSettings, trainer_overrides

WARM_UP = 5  # iterations that do not count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.throughput", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add(
        "--schedules",
        nargs="+",
        default=["1f1b", "dualpipe"],
        metavar="SCHEDULE[+OVERRIDE…]",
        help="the first is what others are compared with",
    )
    add("--layout", default=DemoSettings.layout, help="of dsv3_megatron.conf (default: %(default)s)")
    add("--iterations", type=int, default=25, help=f"of each run, the first {WARM_UP} not counted")
    add("--rounds", type=int, default=2, help="runs of each schedule (default: %(default)s)")
    add("overrides", nargs="*", help="of dsv3_megatron.train_hydra")
    args = parser.parse_args(argv)
    if args.iterations <= WARM_UP:
        parser.error(f"--iterations {args.iterations}: the first {WARM_UP} are not counted, use more")

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as the demo, on the CPU runtime
    rates: dict[str, list[float]] = {schedule: [] for schedule in args.schedules}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for schedule in args.schedules:
                print(f"round {turn + 1} of {args.rounds}: {schedule}", file=sys.stderr, flush=True)
                rate = _tokens_per_s(Path(folder), f"{schedule}-{turn}", schedule, args)
                rates[schedule].append(rate)
                line = {
                    "bench": "training",
                    "schedule": schedule,
                    "round": turn + 1,
                    "tokens_per_s": round(rate, 1),
                }
                print(json.dumps(line), flush=True)
    medians = {schedule: statistics.median(values) for schedule, values in rates.items()}
    base = medians[args.schedules[0]]
    ratios = {schedule: round(rate / base, 4) for schedule, rate in medians.items()}
    print(json.dumps({"bench": "training", "layout": args.layout, "ratio_to_" + args.schedules[0]: ratios}))


def _tokens_per_s(folder: Path, name: str, schedule: str, args: argparse.Namespace) -> float:
    """Median over the iterations of a run of its own, in tokens of all ranks per second."""
    run_dir = folder / name
    schedule, *own = schedule.split("+")
    settings = DemoSettings(
        layout=args.layout,
        schedule=schedule,
        train_iters=args.iterations,
        overrides=(*args.overrides, *own),
    )
    overrides = trainer_overrides(run_dir, settings, args.iterations)
    overrides += ["save=null", "load=null", f"corpus.dir='{folder / 'corpus'}'"]
    cfg = compose(overrides)
    prepare_corpus(folder / "corpus", settings.corpus_bytes, cfg.vocab_size, settings.valid_fraction)
    words = ["--corpus", str(folder / "corpus"), "--num-windows", str(settings.num_windows), "--seed", "1"]
    with contextlib.redirect_stdout(sys.stderr):  # the demo's progress; stdout is for results here
        run_ranks("dsv3_megatron.demo.worker", [*words, *overrides], world_size(cfg), run_dir / "logs")
    rates = read_curves(run_dir / "tensorboard")[TOKENS_PER_S]
    return statistics.median(rate for iteration, rate in rates.items() if iteration > WARM_UP)


if __name__ == "__main__":
    main()
