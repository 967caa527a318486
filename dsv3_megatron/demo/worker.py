"""One rank of the demo: the trainer, with an evaluation of held-out windows beside Megatron's own.

Started by `dsv3_megatron.demo.launch` with the overrides of `dsv3_megatron.train_hydra`.
"""

import argparse
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from dsv3_megatron.demo.corpus import read_tokens
from dsv3_megatron.demo.heldout import ordered_windows, shuffled_windows
from dsv3_megatron.demo.results import SHUFFLED_LOSS, VAL_LOSS


class HeldOutEvaluation:
    """Megatron's `non_loss_data_func`: called with the model at each evaluation, and after the last
    iteration.

    Writes the losses to TensorBoard; that of the shuffled context only after the last iteration.
    """

    def __init__(self, corpus: Path, num_windows: int, seed: int) -> None:
        self.corpus, self.num_windows, self.seed = corpus, num_windows, seed
        self.evaluated_at: int | None = None

    def __call__(self, model: list[Any]) -> None:
        from megatron.training import get_args, get_tensorboard_writer

        from dsv3_megatron.demo.evaluate import mean_loss

        args = get_args()
        # `args.curr_iteration` lags by one inside the training loop; the demo's batch size is constant.
        iteration = args.consumed_train_samples // args.global_batch_size
        if iteration == self.evaluated_at:  # Megatron evaluates once more after the last iteration
            return
        self.evaluated_at = iteration
        windows = ordered_windows(read_tokens(self.corpus, "valid"), self.num_windows, args.seq_length)
        losses = {VAL_LOSS: mean_loss(model, windows)}
        if iteration == args.train_iters:
            losses[SHUFFLED_LOSS] = mean_loss(model, shuffled_windows(windows, self.seed))
        writer = get_tensorboard_writer()  # there is one on the last rank only
        if writer is None:
            return
        for tag, loss in losses.items():
            writer.add_scalar(tag, loss, iteration)
        writer.flush()
        print("[demo] " + ", ".join(f"{tag} {loss:.4f}" for tag, loss in losses.items()), flush=True)


@record
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--num-windows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("overrides", nargs="+")
    options = parser.parse_args(argv)

    from dsv3_megatron import cpu

    cpu.activate()  # before anything imports Megatron

    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv

    evaluation = HeldOutEvaluation(options.corpus, options.num_windows, options.seed)
    train.main(to_argv(compose(options.overrides)), non_loss_data_func=evaluation)


if __name__ == "__main__":
    main()
