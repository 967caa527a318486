"""Shuffled windows: the same targets after the same previous token, in another context."""

from collections import Counter

import numpy as np
import pytest

from dsv3_megatron.demo.heldout import ordered_windows, shuffled_windows

STREAM = np.random.default_rng(5).integers(0, 1000, size=5000).astype(np.uint16)


def scored_pairs(windows, rows) -> Counter:
    """(previous token, target) of everything that counts in these rows."""
    scored = windows.loss_mask[rows] > 0
    return Counter(
        zip(windows.tokens[rows][scored].tolist(), windows.labels[rows][scored].tolist(), strict=True)
    )


def test_ordered_windows_are_the_stream():
    windows = ordered_windows(STREAM, num_windows=6, seq_length=64)
    assert windows.tokens.shape == windows.labels.shape == (6, 64)
    stride = (STREAM.size - 1) // 6
    for i in range(6):
        np.testing.assert_array_equal(windows.tokens[i], STREAM[i * stride : i * stride + 64])
        np.testing.assert_array_equal(windows.labels[i], STREAM[i * stride + 1 : i * stride + 65])
    assert windows.targets().size == 6 * 64


def test_shuffled_windows_score_the_same_pairs_once():
    num_windows, seq_length = 6, 64
    ordered = ordered_windows(STREAM, num_windows, seq_length)
    shuffled = shuffled_windows(ordered, seed=1)
    assert shuffled.tokens.shape == (2 * num_windows, seq_length)
    for i in range(num_windows):
        rows = [i, num_windows + i]
        assert scored_pairs(shuffled, rows) == scored_pairs(ordered, [i])
    # What counts is predicted from the sequence itself: the label is the next token.
    scored = shuffled.loss_mask[:, :-1] > 0
    np.testing.assert_array_equal(shuffled.labels[:, :-1][scored], shuffled.tokens[:, 1:][scored])
    # The context is the window's own, in another order.
    np.testing.assert_array_equal(np.sort(shuffled.tokens[:num_windows]), np.sort(ordered.tokens))
    np.testing.assert_array_equal(np.sort(shuffled.tokens[num_windows:]), np.sort(ordered.labels))
    assert (shuffled.tokens[:num_windows] != ordered.tokens).mean() > 0.9


def test_shuffle_depends_on_the_seed_only():
    ordered = ordered_windows(STREAM, 3, 32)
    first, again, other = (shuffled_windows(ordered, seed).tokens for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_refusals():
    with pytest.raises(ValueError, match="100 held-out tokens are too few for 4 windows of 32"):
        ordered_windows(STREAM[:100], 4, 32)
    with pytest.raises(ValueError, match="use an even length"):
        shuffled_windows(ordered_windows(STREAM, 2, 31), seed=0)
