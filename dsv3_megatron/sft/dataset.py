"""Packed rows as the training and validation data of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dsv3_megatron.sft.prepare import SPLITS
from dsv3_megatron.training.batch import PADDING


class PackedRows(Dataset):
    """`num_samples` rows of a split: whole epochs, each in a random order of its own.

    Sample `i` depends on the folder, `i` and `seed` alone, so that Megatron's samplers give the same data in the same
    order under any data-parallel size and after any resume.
    """

    def __init__(self, folder: Path, split: str, num_samples: int, seed: int) -> None:
        self._tokens, self._answers, self._ends = (
            np.load(folder / f"{split}_{name}.npy", mmap_mode="r") for name in ("tokens", "answers", "ends")
        )
        self.num_samples, self.seed = num_samples, seed
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch asked for last

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row of s tokens.

        Returns:
            tokens, labels, position_ids: int64 [s]; positions begin anew in each sample, and are `PADDING` in padding.
            loss_mask: fp32 [s], 1 where the label is the assistant's (answer or end token).
            cu_seqlens: int32 [s + 1], 0, the samples' ends, then s to the end; padding is a sequence of its own.
            max_seqlen: int32 scalar.
        """
        row = self._row(index)
        tokens = torch.from_numpy(self._tokens[row].astype(np.int64))
        length = tokens.numel()
        answers = torch.from_numpy(np.array(self._answers[row]))
        ends = [int(end) for end in self._ends[row] if end < length]
        bounds = torch.tensor([0, *ends, length], dtype=torch.int32)
        lengths = bounds.diff()
        cu_seqlens = torch.full((length + 1,), length, dtype=torch.int32)
        cu_seqlens[: len(bounds)] = bounds
        starts = torch.repeat_interleave(bounds[:-1], lengths.long())
        positions = torch.arange(length) - starts.long()
        last = int(bounds[-2])
        if _is_padding(tokens[last:], answers[last:]):
            positions[last:] = PADDING
        # A label is the next token. Where a sample ends that is the next sample's first token, which is no answer.
        return {
            "tokens": tokens,
            "labels": tokens.roll(-1),
            "loss_mask": torch.cat([answers[1:], answers.new_zeros(1)]).float(),
            "position_ids": positions,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": lengths.max(),
        }

    def _row(self, index: int) -> int:
        rows = len(self._tokens)
        epoch, place = divmod(index, rows)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(rows)
        return int(self._order[1][place])


def _is_padding(tokens: torch.Tensor, answers: torch.Tensor) -> bool:
    """Whether the end of a row is no sample: one token again and again, and nothing learnt.

    Not by the token itself: a released tokenizer may pad with its end token.
    """
    return not bool(answers.any()) and bool((tokens == tokens[0]).all())


def install() -> None:
    """Let runs with `--sft-data` read packed conversations."""
    from dsv3_megatron.training.datasets import add_source

    add_source(_is_sft, _build)


def _is_sft(args: Any) -> bool:
    return getattr(args, "sft_data", None) is not None


def _build(args: Any, num_samples: Sequence[int], built_here: bool) -> list[PackedRows | None]:
    from megatron.training import print_rank_0

    print_rank_0(f"> packed conversations of {args.sft_data} for training and validation ...")
    return train_valid_test_rows(Path(args.sft_data), num_samples, args.seed, built_here)


def train_valid_test_rows(
    folder: Path, num_samples: Sequence[int], seed: int, built_here: bool
) -> list[PackedRows | None]:
    """The datasets that Megatron asks for; there is no test split."""
    if not built_here:
        return [None, None, None]
    sizes = dict(zip(SPLITS, num_samples, strict=False))
    return [
        *(PackedRows(folder, split, sizes[split] or 0, seed) if sizes[split] else None for split in SPLITS),
        None,
    ]
