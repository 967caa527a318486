"""`GPTDataset.__getitem__`: the first sample's padding is not left out of all later samples' losses.

Megatron makes the loss mask once and keeps it; the first sample's own mask is the kept one, so what is masked for its
padding tokens stays masked in every sample that this process reads later. A resumed run, which begins with another
sample, then trains on other losses than the run that went on.
"""

import functools
from typing import Any

import torch

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def getitem(self: Any, idx: int | None) -> dict[str, torch.Tensor]:
        kept = self.masks_and_position_ids_are_cached
        sample = original(self, idx)
        if not kept and self.masks_and_position_ids_are_cached:
            # It is kept only where nothing but padding is masked (`masks_and_position_ids_are_cacheable`).
            self.cached_loss_mask = torch.ones_like(self.cached_loss_mask)
        return sample

    return getitem


PATCH = Patch(
    name="dataset_loss_mask",
    target="megatron.core.datasets.gpt_dataset:GPTDataset.__getitem__",
    signature="(self, idx)",
    why="padding of the first sample is masked in that sample only: a resumed run has the same losses",
    install=_install,
)
