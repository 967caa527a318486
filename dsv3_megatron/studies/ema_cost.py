"""What the average costs a training step: `python -m dsv3_megatron.studies.ema_cost` (`make bench-ema`).

A step is forward and backward passes that sleep for their declared time, as on a GPU that leaves the CPU free, then an
update of real weights. Steps without the average, with it, and with one that is waited for at once take turns, so that
the machine's other load meets all three alike. The last line is one JSON object; seconds are medians per step:

    step_s, step_s_with_average, step_s_waiting; ratio, ratio_waiting: to step_s; weights: number of them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from dsv3_megatron.ema.average import WeightAverage
from dsv3_megatron.pipeline.autograd_stage import WeightGradients
from dsv3_megatron.studies.sleeping import Durations, SleepingStage, stamped, wake_on_time


class Step:
    """One training step of a stage that sleeps and of weights that are updated."""

    def __init__(self, num_weights: int, num_microbatches: int, unit_s: float) -> None:
        self.stage = SleepingStage(Durations(unit_s, unit_s, unit_s), WeightGradients())
        self.weights = {f"{i}": torch.randn(num_weights // 10) for i in range(10)}
        self.num_microbatches = num_microbatches
        self.average = WeightAverage(self.weights, decay=0.999)

    def __call__(self, after: Callable[[], None]) -> float:
        """Seconds from the first forward to the end of the weights' update; `after` is called behind it, in time."""
        begin = time.perf_counter()
        for _ in range(self.num_microbatches):
            self.stage(stamped()).sum().backward()
        self.average.wait()
        for weight in self.weights.values():
            weight.mul_(0.9999)
        after()
        return time.perf_counter() - begin

    def wait_at_once(self) -> None:
        """The average on the critical path."""
        self.average.update()
        self.average.wait()


def measure(step: Step, rounds: int) -> dict[str, float]:
    """Medians of `rounds` steps of each kind (see the module's docstring)."""
    kinds: dict[str, Callable[[], None]] = {
        "step_s": lambda: None,
        "step_s_with_average": step.average.update,
        "step_s_waiting": step.wait_at_once,
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds):
        for name, after in kinds.items():
            # Two steps: the second one pays for what the first one has begun.
            step(after)
            times[name].append(step(after))
            step.average.wait()
        print(f"[bench] round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["step_s"]
    ratios = {
        "ratio": medians["step_s_with_average"] / base,
        "ratio_waiting": medians["step_s_waiting"] / base,
    }
    return {**medians, **ratios}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_megatron.studies.ema_cost")
    parser.add_argument("--weights", type=int, default=10_000_000, help="default: %(default)s")
    parser.add_argument("--microbatches", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--unit-ms", type=float, default=40, help="of F; B and W are as long (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    wake_on_time()
    step = Step(args.weights, args.microbatches, args.unit_ms / 1000)
    print(json.dumps({**measure(step, args.rounds), "weights": args.weights}))


if __name__ == "__main__":
    main()
