"""The unigram loss against closed forms."""

import math

import numpy as np
import pytest

from dsv3_megatron.demo.unigram import unigram_loss


def test_counts_written_out():
    # counts 3, 1, 0 of a vocabulary of 3; add-one smoothing: 4/7, 2/7, 1/7
    train = np.array([0, 0, 1, 0], dtype=np.uint16)
    targets = np.array([[0, 1], [2, 2]])
    expected = -(math.log(4 / 7) + math.log(2 / 7) + 2 * math.log(1 / 7)) / 4
    assert unigram_loss(train, targets, 3) == pytest.approx(expected, rel=1e-12)


def test_uniform_text_gives_log_of_vocabulary():
    vocab_size = 50
    train = np.tile(np.arange(vocab_size), 20)
    assert unigram_loss(train, np.array([0, 17, 49]), vocab_size) == pytest.approx(
        math.log(vocab_size), rel=1e-12
    )


def test_large_sample_gives_entropy():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(20))
    train, targets = (rng.choice(20, size=200_000, p=p) for _ in range(2))
    entropy = -(p * np.log(p)).sum()
    deviation = math.sqrt((p * (np.log(p) + entropy) ** 2).sum() / targets.size)
    assert abs(unigram_loss(train, targets, 20) - entropy) < 5 * deviation


def test_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="a training token is 7, the vocabulary has 5 entries"):
        unigram_loss(np.array([7]), np.array([0]), 5)
