"""How much slower an emulated FP8 step of the demo's model is than a BF16 step, on CPU, in one run.

    python -m dsv3_megatron.studies.fp8_speed [--steps N] [--rounds N]

BF16 and FP8 alternate in processes of their own. The last line on stdout is one JSON object.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.demo.launch import run_ranks
from dsv3_megatron.demo.results import TOKENS_PER_S, read_curves

MODEL = (
    "model=tiny",
    "layout=cpu_single",
    "data=mock",
    "device=cpu",
    "seq_length=256",
    "max_position_embeddings=256",
    "global_batch_size=4",
    "micro_batch_size=4",
    "eval_iters=0",
    "tensorboard_log_interval=1",
)
TOKENS_PER_STEP = 4 * 256
WARMUP = 3  # steps that are not counted


def step_seconds(precision: str, steps: int, folder: Path) -> list[float]:
    """Wall time of each step after the first three, of a training of its own."""
    overrides = [*MODEL, f"precision={precision}", f"train_iters={steps}", f"tensorboard_dir='{folder}'"]
    run_ranks("dsv3_megatron.train_hydra", overrides, 1, folder / "logs")
    rates = read_curves(folder)[TOKENS_PER_S]
    return [TOKENS_PER_STEP / rate for step, rate in rates.items() if step > WARMUP]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.fp8_speed", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=12, help="per training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.steps <= WARMUP or options.rounds < 1:
        parser.error(f"--steps {options.steps} --rounds {options.rounds}: at least {WARMUP + 1} and 1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    seconds: dict[str, list[float]] = {"bf16": [], "fp8_dsv3": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for precision, times in seconds.items():
                times += step_seconds(precision, options.steps, Path(folder) / f"{precision}{number}")
                print(f"[bench] {precision}: {statistics.median(times):.3f} s per step", flush=True)
    bf16, fp8 = (statistics.median(times) for times in seconds.values())
    print(json.dumps({"bf16_s": round(bf16, 4), "fp8_s": round(fp8, 4), "ratio": round(fp8 / bf16, 3)}))


if __name__ == "__main__":
    main()
