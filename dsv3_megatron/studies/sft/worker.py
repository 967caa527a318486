"""One rank of the fine-tuning demo: the trainer, with the accuracy on held-out answers before, on the way and after."""

import argparse
import json
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record


class AccuracyCurve:
    """Hooks around the training steps; rank 0 (of those that know it) writes `accuracy.json`: {iteration: accuracy}."""

    def __init__(self, data: Path, num_rows: int, every: int, file: Path) -> None:
        from dsv3_megatron.sft.dataset import PackedRows

        self.rows = PackedRows(data, "valid", num_rows, seed=0)
        self.every, self.file = every, file
        self.curve: dict[int, Any] = json.loads(file.read_text()) if file.exists() else {}

    def before_step(self, call: dict[str, Any]) -> None:
        if call["iteration"] == 0:
            self._measure(call["model"], 0)

    def after_step(self, call: dict[str, Any], result: Any) -> None:
        from megatron.training import get_args

        iteration = call["iteration"] + 1
        if iteration % self.every == 0 or iteration == get_args().train_iters:
            self._measure(call["model"], iteration)

    def _measure(self, model: list[Any], iteration: int) -> None:
        from megatron.core import mpu

        from dsv3_megatron.sft.accuracy import accuracy

        found = accuracy(model, self.rows)
        if found is None or mpu.get_data_parallel_rank() != 0:
            return
        self.curve[iteration] = found
        self.file.write_text(json.dumps(self.curve, indent=2) + "\n")
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
        print(f"[demo] held-out answers after {iteration} iterations: {shown}", flush=True)


@record
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num-rows", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--accuracy-file", type=Path, required=True)
    parser.add_argument("overrides", nargs="+")
    options = parser.parse_args(argv)

    from dsv3_megatron import cpu

    cpu.activate()  # before anything imports Megatron

    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv
    from dsv3_megatron.training import hooks

    curve = AccuracyCurve(options.data, options.num_rows, options.every, options.accuracy_file)
    hooks.before_step(curve.before_step)
    hooks.after_step(curve.after_step)
    train.main(to_argv(compose(options.overrides)))


if __name__ == "__main__":
    main()
