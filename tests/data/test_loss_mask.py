"""Megatron's GPTDataset keeps one loss mask: that of the first sample must not leak into the others."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from dsv3_megatron import patching

PAD = 3
SAMPLES = [numpy.array([1, PAD, 2, 5, 4]), numpy.array([6, 7, 8, 9, 10]), numpy.array([1, 2, 3, PAD, 5])]


class Dataset(GPTDataset):
    """Three samples of four tokens, without files."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(
            add_extra_token_to_sequence=True,
            tokenizer=SimpleNamespace(eod=0),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            inter_document_masking=False,
        )
        self._pad_token_id = PAD
        self.masks_and_position_ids_are_cacheable = True
        self.masks_and_position_ids_are_cached = False

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[numpy.ndarray, None, list[int]]:
        return SAMPLES[idx].copy(), None, [5]


def masks(*order: int) -> dict[int, list[float]]:
    dataset = Dataset()
    return {i: GPTDataset.__getitem__(dataset, i)["loss_mask"].tolist() for i in order}


@pytest.fixture
def unpatched():
    patching.unload("dataset_loss_mask")
    yield
    patching.install(["dataset_loss_mask"])


def test_masks_do_not_depend_on_what_was_read_first() -> None:
    patching.install(["dataset_loss_mask"])
    expected = {0: [0.0, 1.0, 1.0, 1.0], 1: [1.0, 1.0, 1.0, 1.0], 2: [1.0, 0.0, 0.0, 1.0]}
    assert expected == {i: (torch.from_numpy(s[1:]) != PAD).float().tolist() for i, s in enumerate(SAMPLES)}
    assert masks(0, 1, 2) == masks(1, 2, 0) == masks(2, 0, 1) == expected


def test_megatrons_own_do(unpatched: None) -> None:
    """The reason for the patch: when this fails, it can go."""
    assert masks(0, 1) != masks(1, 0)


def test_a_tokenizer_without_padding_token_masks_nothing() -> None:
    patching.install(["dataset_loss_mask"])
    dataset = Dataset()
    dataset._pad_token_id = None  # type: ignore[assignment]
    sample = GPTDataset.__getitem__(dataset, 0)
    assert dataset._pad_token_id == -1  # with which Megatron fills a short sample up
    assert sample["loss_mask"].tolist() == [1.0] * 4 and sample["tokens"].tolist() == SAMPLES[0][:-1].tolist()
