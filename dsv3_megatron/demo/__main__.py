"""A small DeepSeek-V3 learns the source text of Python's standard library, in four processes without a GPU.

The last line on stdout is one JSON object (see `dsv3_megatron.demo.results.summarise`). The same command
again goes on from the checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path

from dsv3_megatron.demo.benchmarks import benchmark, lines
from dsv3_megatron.demo.launch import RunFailed, RunInterrupted
from dsv3_megatron.demo.run import DemoSettings, run_demo


def main(argv: list[str] | None = None) -> int:
    defaults = DemoSettings()
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.demo", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument(
        "--layout", default=defaults.layout, help="a layout of dsv3_megatron.conf (default: %(default)s)"
    )
    parser.add_argument(
        "--schedule",
        default=defaults.schedule,
        help="a pipeline schedule of dsv3_megatron.conf (default: %(default)s)",
    )
    parser.add_argument(
        "--train-iters", type=int, default=defaults.train_iters, help="iterations of the first run"
    )
    parser.add_argument("--more-iters", type=int, default=60, help="iterations of each further run")
    parser.add_argument(
        "--corpus-bytes", type=int, default=defaults.corpus_bytes, help="text to use, at most"
    )
    parser.add_argument(
        "--num-windows", type=int, default=defaults.num_windows, help="held-out windows to evaluate"
    )
    parser.add_argument(
        "--no-evaluation", action="store_true", help="leave out dsv3 evaluate of the model at the end"
    )
    parser.add_argument("overrides", nargs="*", help="of dsv3_megatron.train_hydra, for instance lr=1e-3")
    args = parser.parse_args(argv)
    settings = DemoSettings(
        layout=args.layout,
        schedule=args.schedule,
        train_iters=args.train_iters,
        corpus_bytes=args.corpus_bytes,
        num_windows=args.num_windows,
        overrides=tuple(args.overrides),
    )
    try:
        result = run_demo(args.run_dir, settings, args.more_iters)
        figures = None if args.no_evaluation else benchmark(args.run_dir, result["iteration"])
    except (ValueError, LookupError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RunInterrupted) as error:
        print(
            f"interrupted: {error or 'SIGINT'}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    print(f"[demo] picture: {args.run_dir / 'loss.png'}")
    for picture in sorted(args.run_dir.glob("pipeline_step*.png")):
        print(f"[demo] measured timeline: {picture}")
    print(f"[demo] curves: tensorboard --logdir {args.run_dir / 'tensorboard'}")
    for line in lines(figures or {}):
        print(line)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
