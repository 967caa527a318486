"""What moving experts costs beside a step: `python -m dsv3_megatron.studies.placement_cost` (`make bench-placement`).

Four processes train a small model with `--expert-placement balanced`; after every third step all experts of all layers
go to the next rank, with masters and moments, which is the most that can move. The last line is one JSON object;
seconds are medians, of the slowest rank:

    step_s, move_s; ratio: of a move to a step; experts: how many moved, of all layers together.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.conf import compose, to_argv
from dsv3_megatron.demo.launch import run_ranks

INTERVAL, WARM_UP = 3, 2


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.placement_cost", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of dsv3_megatron.train_hydra")
    args = parser.parse_args(argv)
    words = [
        "model=tiny",
        "layout=cpu_ep4",
        "device=cpu",
        "eval_iters=0",
        f"train_iters={args.steps}",
        *args.overrides,
    ]
    words += ["expert_placement=balanced", f"expert_placement_interval={args.steps + 1}"]
    if args.worker is not None:
        _work(args.worker, words)
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        own = ["--steps", str(args.steps), "--worker", str(result), *args.overrides]
        run_ranks("dsv3_megatron.studies.placement_cost", own, 4, Path(folder) / "logs")
        print(result.read_text())


def _work(result: Path, words: list[str]) -> None:
    from dsv3_megatron import cpu

    cpu.activate()
    import torch
    import torch.distributed as dist

    from dsv3_megatron import train
    from dsv3_megatron.expert_placement.trainer import current
    from dsv3_megatron.training import hooks

    steps: list[float] = []
    moves: list[float] = []
    experts: list[int] = []
    begun = [0.0]

    def before(call: dict[str, Any]) -> None:
        dist.barrier()
        begun[0] = time.perf_counter()

    def after(call: dict[str, Any], outcome: Any) -> None:
        dist.barrier()
        steps.append(time.perf_counter() - begun[0])
        placement = current()
        assert placement is not None
        if len(steps) % INTERVAL == 0:
            start = time.perf_counter()
            experts.append(placement.move([layer.slots.roll(layer.per_rank) for layer in placement.layers]))
            dist.barrier()
            moves.append(time.perf_counter() - start)
            print(
                f"[bench] step {len(steps)}: {steps[-1]:.3f} s, move {moves[-1]:.3f} s",
                file=sys.stderr,
                flush=True,
            )

    hooks.before_step(before)
    hooks.after_step(after)
    train.main(to_argv(compose(words, processes=4)))
    figures = torch.tensor([statistics.median(steps[WARM_UP:]), statistics.median(moves[1:] or moves)])
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        step, move = figures.tolist()
        found = {"step_s": step, "move_s": move, "ratio": move / step}
        result.write_text(json.dumps({**{k: round(v, 4) for k, v in found.items()}, "experts": experts[-1]}))


if __name__ == "__main__":
    main()
