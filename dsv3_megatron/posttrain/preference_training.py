"""DPO in the trainer: its loss, and where the reference's log-probabilities come from."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.files import whole
from dsv3_megatron.posttrain.arguments import report_of
from dsv3_megatron.posttrain.dataset import PreferenceRows
from dsv3_megatron.posttrain.preference_loss import dpo_terms, sequence_sums
from dsv3_megatron.posttrain.reference import ReferenceWeights
from dsv3_megatron.posttrain.run import Run, repeated

__all__ = ["PreferenceTraining"]


class PreferenceTraining(Run):
    """What `--posttrain dpo` does around Megatron's steps, on one rank."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        report = report_of(args)
        assert report is not None, "refused before"
        self.splits = ("train", "valid") if args.eval_iters else ("train",)
        self.rows = {name: report[name]["rows"] for name in self.splits}
        self.num_sequences = 2 * (report["train"]["pairs"] + report["valid"]["pairs"])
        # Megatron divides by the pairs what the routers weigh by their tokens.
        self.pairs_per_token = report["train"]["pairs"] / report["train"]["tokens"]
        self.sums = torch.full((self.num_sequences,), torch.nan, dtype=torch.float64)  # of the reference
        self.reference: ReferenceWeights | None = None

    # --- the reference

    def after_load(self, call: dict[str, Any], iteration: int) -> None:
        if self.args.dpo_reference == "live":
            self.reference = ReferenceWeights(call["ddp_model"])
            self.begin_reference(self.reference, iteration)

    def before_step(self, call: dict[str, Any]) -> None:
        if self.reference is not None:
            self._score_this_step(call)
        elif self.sums.isnan().all():
            self._read_or_compute(call)

    def _read_or_compute(self, call: dict[str, Any]) -> None:
        file = self._cache_file()
        if file.is_file():
            self.sums = torch.from_numpy(np.load(file))
            self.say(f"log-probabilities of the reference from {file}")
            return
        if call["iteration"]:
            raise RefusedArgument(
                f"--dpo-reference cached: {file} is gone, and the weights are no longer the reference's. Begin anew "
                "with an empty --save"
            )
        for name in self.splits:
            self._score_split(call["model"], name)
        if torch.distributed.get_rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole(file) as unfinished, open(unfinished, "wb") as written:
                np.save(written, self.sums.numpy())
        self.say(f"log-probabilities of the reference kept in {file}")

    def _cache_file(self) -> Path:
        """Named by the pairs and by the checkpoint that the run began with: other weights, another file."""
        folder = Path(self.args.preference_data)
        digest = hashlib.blake2b(digest_size=8)
        for name in self.splits:
            for what in ("tokens", "sequences"):
                digest.update((folder / f"{name}_{what}.npy").read_bytes())
        digest.update(self.first_weights().encode())
        return Path(self.args.dpo_reference_dir or folder) / f"reference_{digest.hexdigest()}.npy"

    def _score_split(self, model: list[Any], name: str) -> None:
        """All rows of a split; the last step's rows are filled up with the first ones."""
        from megatron.core import mpu
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from torch.utils.data import default_collate

        size, count = self.args.micro_batch_size, get_num_microbatches()
        dp_rank, dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        rows = PreferenceRows(Path(self.args.preference_data), name, self.rows[name], seed=0)
        batch = size * count * dp_size

        def batches(start: int) -> Iterator[dict[str, Tensor]]:
            for m in range(count):
                first = start + (m * dp_size + dp_rank) * size
                yield default_collate([rows[i % len(rows)] for i in range(first, first + size)])

        for start in range(0, len(rows), batch):
            self._fill(model, list(batches(start)))
            self.say(f"reference: {min(start + batch, len(rows))}/{len(rows)} {name} rows")

    def _score_this_step(self, call: dict[str, Any]) -> None:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        given = call["data_iterator"]
        first = given[0] if isinstance(given, list) else given
        own = [] if first is None else list(islice(_iterate(first), get_num_microbatches()))
        if isinstance(given, list):
            for other in given[1:]:  # the same microbatches, for another chunk
                if other is not None and other is not first:
                    list(islice(_iterate(other), get_num_microbatches()))
        assert self.reference is not None
        with self.reference.in_place():
            self._fill(call["model"], own, reads=first is not None)
        call["data_iterator"] = repeated(own if first is not None else None, given)

    def _fill(self, model: list[Any], batches: Sequence[dict[str, Tensor]], reads: bool = True) -> None:
        from dsv3_megatron.posttrain.scoring import score, to_sums

        found = score(model, lambda: iter([dict(b) for b in batches]) if reads else None, len(batches))
        sums, known = to_sums(found, self.num_sequences)
        self.sums = torch.where(known.cpu(), sums.cpu(), self.sums)

    # --- the step

    def loss(self, batch: dict[str, Any], losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over the pairs of a microbatch, their number, and what is logged."""
        args = self.args
        sequence = batch["sequence"].flatten()
        inside = sequence >= 0
        pairs, place = (sequence // 2).clamp(min=0)[inside].unique(return_inverse=True)
        count = len(pairs)
        answer = 2 * place + sequence[inside] % 2
        log_probs = -losses.flatten().float()[inside]
        sums = sequence_sums(log_probs, answer, 2 * count)
        lengths = sequence_sums(torch.ones_like(log_probs), answer, 2 * count)
        numbers = pairs.cpu()
        reference = torch.stack([self.sums[2 * numbers], self.sums[2 * numbers + 1]], 1).flatten()
        if reference.isnan().any():
            raise RuntimeError("a pair without log-probabilities of the reference")
        reference = reference.to(sums)
        terms = dpo_terms(
            sums[0::2],
            sums[1::2],
            reference[0::2],
            reference[1::2],
            args.dpo_beta,
            label_smoothing=args.dpo_label_smoothing,
            loss=args.dpo_loss,
            chosen_lengths=lengths[0::2] if args.dpo_length_normalized else None,
            rejected_lengths=lengths[1::2] if args.dpo_length_normalized else None,
        )
        # Of a microbatch without pairs (there is none in our data) the graph must still exist.
        total = terms.loss.sum() if count else losses.sum() * 0
        report = {
            "loss": (terms.loss.sum(), count),
            "margin": (args.dpo_beta * (terms.chosen - terms.rejected).sum(), count),
            "accuracy": ((terms.chosen > terms.rejected).sum(), count),
            "chosen": (terms.chosen.sum(), count),
            "rejected": (terms.rejected.sum(), count),
            # log π_ref − log π, whose mean over samples of the reference is KL(π_ref ‖ π).
            "kl": (-(terms.chosen + terms.rejected).sum(), lengths.sum()),
        }
        return self.finish_loss(total, torch.tensor(count, dtype=torch.int, device=losses.device), report)

    def balance_scale(self) -> float:
        return self.pairs_per_token


def _iterate(iterator: Any) -> Iterator[dict[str, Tensor]]:
    """Megatron's wrapper of an iterator is none itself."""
    while True:
        yield next(iterator)
