"""The unigram model, what a language model must beat: each token by its frequency, whatever the context."""

import numpy as np


def unigram_loss(train_tokens: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    """Mean cross entropy, in nats per token, of `targets` under frequencies of `train_tokens`.

    Both are integer arrays of any shape with ids below `vocab_size`. Add-one smoothing: p(v) = (count(v) + 1)
    / (num tokens + vocab_size), so that a token never seen has a finite loss.
    """
    counts = np.bincount(train_tokens.reshape(-1), minlength=vocab_size)
    if counts.size > vocab_size:
        raise ValueError(f"a training token is {counts.size - 1}, the vocabulary has {vocab_size} entries")
    log_p = np.log(counts + 1.0) - np.log(counts.sum() + vocab_size)
    return float(-log_p[targets].mean())
