"""Do bf16 moments train as fp32 moments do? The demo's model, 1000 steps, the same seed and data.

    python -m dsv3_megatron.optimizer.study [--run-dir runs/moments_study]

One process; an interrupted run goes on. The last line on stdout is one JSON object: smoothed losses at the end and
their relative difference, over all steps after the warm-up and at the end. Exit status 1 when the largest is 0.5% or
more.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.demo import study
from dsv3_megatron.demo.launch import RunFailed, RunInterrupted
from dsv3_megatron.demo.results import Curve

ITERATIONS = 1000
TARGET = 0.005  # relative difference of the smoothed losses
SIZE = (
    "global_batch_size=2",
    "micro_batch_size=2",
    "lr=1e-3",
    "min_lr=1e-4",
    "save_interval=100",
    "eval_iters=0",
)
RUNS = {
    "bf16_moments": ("precision=bf16",),
    "fp32_moments": ("precision=bf16", "exp_avg_dtype=fp32", "exp_avg_sq_dtype=fp32"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.optimizer.study", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs/moments_study"), help="default: %(default)s"
    )
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="default: %(default)s")
    options = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the runs, which are of the CPU runtime
    try:
        study.prepare(options.run_dir)
        for name, overrides in RUNS.items():
            study.train(name, options.run_dir, options.iterations, (*SIZE, *overrides))
        curves = study.losses(RUNS, options.run_dir, options.iterations)
        result = compare(curves, warmup=options.iterations // 10)
        draw(curves, result, options.run_dir / "study.png")
    except (LookupError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RunInterrupted) as error:
        print(f"interrupted: {error or 'SIGINT'}; the same command goes on", file=sys.stderr)
        return 130
    print(f"[study] picture: {options.run_dir / 'study.png'}")
    print(json.dumps(result))
    return 0 if result["within_target"] else 1


def differences(curves: Mapping[str, Curve]) -> Curve:
    """Relative difference of the smoothed losses, |bf16 − fp32| / fp32, by step; LookupError for other steps."""
    bf16, fp32 = (study.smoothed(curves[name]) for name in RUNS)
    if bf16.keys() != fp32.keys():
        raise LookupError("the runs have different steps: train them to the same --iterations")
    return {step: abs(bf16[step] - fp32[step]) / fp32[step] for step in fp32}


def compare(curves: Mapping[str, Curve], warmup: int) -> dict[str, Any]:
    """Figures of the two curves after the first `warmup` steps."""
    by_step = differences(curves)
    after = [value for step, value in by_step.items() if step > warmup]
    last = max(by_step)
    return {
        "steps": last,
        "loss_bf16_moments": study.smoothed(curves["bf16_moments"])[last],
        "loss_fp32_moments": study.smoothed(curves["fp32_moments"])[last],
        "max_difference": max(after),
        "mean_difference": sum(after) / len(after),
        "last_difference": by_step[last],
        "within_target": max(after) < TARGET,
    }


def draw(curves: Mapping[str, Curve], result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: smoothed losses, and their relative difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True)
    for name, curve in curves.items():
        values = study.smoothed(curve)
        top.plot(list(values), list(values.values()), label=name.replace("_", " "), linewidth=1)
    top.set(ylabel="loss (nats per token)", title="Training loss, smoothed (EMA 0.9)")
    top.legend()
    by_step = differences(curves)
    bottom.plot(list(by_step), [100 * value for value in by_step.values()], linewidth=1)
    bottom.axhline(100 * TARGET, color="black", linestyle="--", linewidth=0.8)
    bottom.set(xlabel="step", ylabel="relative difference (%)", ylim=(0, None))
    bottom.set_title(f"bf16 against fp32 moments: {result['last_difference']:.3%} at the end")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
