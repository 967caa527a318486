"""Packed pairs as the training and validation data of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv3_megatron.sft.dataset import PackedRows
from dsv3_megatron.sft.prepare import SPLITS

__all__ = ["PreferenceRows", "train_valid_test_rows"]


class PreferenceRows(PackedRows):
    """Rows of pairs in the order of `PackedRows`.

    Args:
        mtp: whether the MTP layer learns the chosen answers; else no token has a loss there.
    """

    def __init__(self, folder: Path, split: str, num_samples: int, seed: int, mtp: bool = False) -> None:
        super().__init__(folder, split, num_samples, seed)
        self._sequences = np.load(folder / f"{split}_sequences.npy", mmap_mode="r")
        self._mtp = mtp

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """As a row of fine-tuning, with `sequence` int64 [s]: the answer that a position's label is of, −1 for none.

        `loss_mask` fp32 [s] is what the MTP layer's loss weighs tokens by: 1 / length in chosen answers, so that each
        pair counts the same there as in the preference loss. Zeros without `mtp`.
        """
        row = super().__getitem__(index)
        numbers = torch.from_numpy(self._sequences[self._row(index)].astype(np.int64))
        bounds = row["cu_seqlens"].long().unique_consecutive()
        samples = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
        numbers = torch.cat([numbers, numbers.new_full((1,), -1)])  # padding is a sample of its own
        sequence = torch.where(row["loss_mask"] > 0, numbers[samples], -1)
        row["sequence"] = sequence
        row["loss_mask"] = mtp_weights(sequence) if self._mtp else torch.zeros_like(row["loss_mask"])
        return row


def mtp_weights(sequence: torch.Tensor) -> torch.Tensor:
    """1 / length where the label is of a chosen answer, else 0: int64 [s] → fp32 [s]."""
    chosen = (sequence >= 0) & (sequence % 2 == 0)
    _, places, lengths = sequence.unique(return_inverse=True, return_counts=True)
    return torch.where(chosen, 1.0 / lengths[places], 0.0).float()


def train_valid_test_rows(
    args: Any, num_samples: Sequence[int], built_here: bool
) -> list[PreferenceRows | None]:
    """The datasets that Megatron asks for; there is no test split."""
    if not built_here:
        return [None, None, None]
    folder, sizes = Path(args.preference_data), dict(zip(SPLITS, num_samples, strict=False))
    return [
        *(
            PreferenceRows(folder, name, sizes[name] or 0, args.seed, args.posttrain_mtp_loss)
            if sizes[name]
            else None
            for name in SPLITS
        ),
        None,
    ]
