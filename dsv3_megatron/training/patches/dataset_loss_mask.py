"""`GPTDataset.__getitem__`: the first sample's padding is not left out of all later samples' losses; no padding is -1.

Megatron makes the loss mask once and keeps it; the first sample's own mask is the kept one, so what is masked for its
padding tokens stays masked in every sample that this process reads later. A resumed run, which begins with another
sample, then trains on other losses than the run that went on.

Of a tokenizer without a padding token Megatron takes None, with which a sample that is too short cannot be filled up. Its
own id for data without such a token is -1, which it takes by itself where padding is the end token.
"""

import functools
from typing import Any

import torch

from dsv3_megatron.patching import Patch

_NO_TOKEN = -1  # megatron.core.datasets.megatron_dataset: where the tokenizer has no padding token


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def getitem(self: Any, idx: int | None) -> dict[str, torch.Tensor]:
        if self._pad_token_id is None:
            self._pad_token_id = _NO_TOKEN
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
    why="padding of the first sample is masked in that sample only: a resumed run has the same losses; a tokenizer "
    "without padding token can be used",
    install=_install,
)
