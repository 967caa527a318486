"""Do bf16 moments train as fp32 moments do? The demo's model, 1000 steps, the same seed and data.

    python -m dsv3_megatron.studies.moments [--run-dir runs/moments_study]

One process; an interrupted run goes on. Beside the two runs there is the noise floor: fp32 moments from weights that
differ by less than a rounding. The last line on stdout is one JSON object. Exit status 1 when bf16 moments are off by
0.5% or more in any step after the warm-up.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.demo.launch import RunFailed, RunInterrupted
from dsv3_megatron.studies import demo_runs as study
from dsv3_megatron.studies.comparison import compare, draw, table

ITERATIONS = 1000
BASELINE = "fp32_moments"
TARGET = 0.005  # relative difference of the smoothed losses
FP32 = ("precision=bf16", "exp_avg_dtype=fp32", "exp_avg_sq_dtype=fp32")
RUNS = {
    BASELINE: FP32,
    "bf16_moments": ("precision=bf16",),
    "fp32_perturbed": (*FP32, study.PERTURBED),
}
# The learning rate is DeepSeek-V3's: at 1e-3 even the noise floor is above the target.
LR = 2.2e-4


def size(lr: float) -> tuple[str, ...]:
    """Overrides that all runs have."""
    return (
        *("global_batch_size=2", "micro_batch_size=2", "save_interval=100", "eval_iters=0"),
        *(f"lr={lr}", f"min_lr={lr / 10}"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.moments", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs/moments_study"), help="default: %(default)s"
    )
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=LR, help="peak learning rate, default: %(default)s")
    options = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the runs, which are of the CPU runtime
    try:
        study.prepare(options.run_dir)
        for name, overrides in RUNS.items():
            study.train(name, options.run_dir, options.iterations, (*size(options.lr), *overrides))
        curves = study.losses(RUNS, options.run_dir, options.iterations)
        result = compare(curves, BASELINE, TARGET, warmup=options.iterations // 10)
        draw(curves, result, options.run_dir / "study.png")
    except (LookupError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RunInterrupted) as error:
        print(f"interrupted: {error or 'SIGINT'}; the same command goes on", file=sys.stderr)
        return 130
    print(table(result))
    print(f"[study] picture: {options.run_dir / 'study.png'}")
    result["within_target"] = result["runs"]["bf16_moments"]["max_error"] < TARGET
    print(json.dumps(result))
    return 0 if result["within_target"] else 1


if __name__ == "__main__":
    sys.exit(main())
