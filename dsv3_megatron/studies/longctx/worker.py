"""One training phase of the long-context demonstration, measured at its end.

Started with a file for the measurements and the overrides of `dsv3_megatron.train_hydra`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from dsv3_megatron.studies.longctx import needles

LENGTHS = (256, 512, 1024, 2048)
DEPTHS = tuple(i / 8 for i in range(9))
TRIALS = 16  # needles of each length and depth
SEQUENCES = 16  # for the loss by position
BUCKETS = 16  # of positions
SEED = 20_000


class Measurement:
    """Megatron's `non_loss_data_func`: once after the last step, loss by position and needles found."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, model: list[Any]) -> None:
        from megatron.training import get_args

        args = get_args()
        if args.consumed_train_samples < args.train_iters * args.global_batch_size:
            return
        with torch.no_grad():
            result = {
                "loss": loss_by_position(model[0]),
                "found": {str(n): found(model[0], n) for n in LENGTHS},
            }
        self.path.write_text(json.dumps(result) + "\n")
        print(f"[demo] measured: {self.path}", flush=True)


def logits_of(model: Any, tokens: np.ndarray) -> torch.Tensor:
    """fp32 [b, s, vocabulary] for int64 tokens [b, s]."""
    ids = torch.from_numpy(tokens)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model(ids, positions, None)[..., : needles.VOCAB_SIZE].float()


def loss_by_position(model: Any) -> dict[str, list[float]]:
    """Mean cross entropy in each of BUCKETS equal parts of the longest sequences: of all tokens, of answers alone."""
    rng = np.random.default_rng(SEED)
    length = LENGTHS[-1]
    sums = np.zeros((2, BUCKETS))
    counts = np.zeros((2, BUCKETS))
    for _ in range(SEQUENCES):
        row = needles.sequence(rng, length + 1)[None]
        logits = logits_of(model, row[:, :-1])
        losses = torch.nn.functional.cross_entropy(
            logits[0], torch.from_numpy(row[0, 1:]), reduction="none"
        ).numpy()
        answer = needles.answers(row)[0, 1:]
        bucket = np.arange(length) * BUCKETS // length
        for i, mask in enumerate((np.ones(length, bool), answer)):
            sums[i] += np.bincount(bucket[mask], losses[mask], BUCKETS)
            counts[i] += np.bincount(bucket[mask], minlength=BUCKETS)
    all_tokens, only_answers = (sums / counts).tolist()
    return {"all": all_tokens, "answers": only_answers}


def found(model: Any, length: int) -> list[float]:
    """Share of needles whose value gets the highest probability, for each of DEPTHS."""
    rng = np.random.default_rng(SEED + length)
    shares = []
    for depth in DEPTHS:
        rows, values = zip(*(needles.needle(rng, length, depth) for _ in range(TRIALS)), strict=True)
        hits = 0
        for start in range(0, TRIALS, 4):
            logits = logits_of(model, np.stack(rows[start : start + 4]))[:, -1]
            hits += int((logits.argmax(-1).numpy() == np.array(values[start : start + 4])).sum())
        shares.append(hits / TRIALS)
    return shares


@record
def main(argv: list[str] | None = None) -> None:
    path, *overrides = sys.argv[1:] if argv is None else argv

    from dsv3_megatron import cpu

    cpu.activate()  # before anything imports Megatron

    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv

    train.main(to_argv(compose(overrides)), non_loss_data_func=Measurement(Path(path)))


if __name__ == "__main__":
    main()
