"""Packing: every sample once, no row too long, little left empty."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.sft.pack import pack


@settings(max_examples=50)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(0, 3))
def test_every_sample_once_and_no_row_too_long(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 64, seed)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in row) <= 64 for row in rows)
    assert rows == pack(lengths, 64, seed)
    # Two rows that would fit together are never left (as long as both were open: 80 samples, 64 rows looked back).
    if len(rows) <= 64:
        fill = sorted(sum(lengths[sample] for sample in row) for row in rows)
        assert len(fill) < 2 or fill[0] + fill[1] > 64


def test_rows_are_mixtures() -> None:
    rows = pack([4] * 400, 64)
    assert len(rows) == 25
    assert any(abs(a - b) > 100 for row in rows for a, b in itertools.pairwise(row))
    assert rows != pack([4] * 400, 64, seed=1)


def test_a_sample_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="a sample of 65 tokens does not fit into a row of 64"):
        pack([3, 65], 64)
