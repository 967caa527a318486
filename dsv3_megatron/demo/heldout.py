"""Held-out windows, and the same targets with their context shuffled.

Does the model use attention? Then it must lose when the context of a token is shuffled. The token right
before the target stays in place: it reaches the target through the residual stream alone, so a model without
attention would lose nothing. The test works on pairs (previous token, target):

    ordered   x0 x1 x2 x3 x4 x5 x6 x7   predict each token from those before it
    shuffled  x4 x5 x0 x1 x6 x7 x2 x3   predict the second token of each pair; the pairs come in random order
              x3 x4 x7 x8 x1 x2 x5 x6   once more, with pairs that begin at the odd tokens

Together the two rows have exactly the targets of the ordered row, each once and after its own previous token.
The shuffled context consists of pairs of the same window, thus has the same words. A part of them comes from
after the target, which can only help the model: the loss found is, if anything, too low.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Sequences to evaluate: `tokens`, `labels` int64 [n, s]; `loss_mask` fp32 [n, s], 1 where the label
    counts."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray

    def targets(self) -> np.ndarray:
        """Labels that count, int64 [number of them]."""
        return self.labels[self.loss_mask > 0]


def ordered_windows(stream: np.ndarray, num_windows: int, seq_length: int) -> Windows:
    """`num_windows` windows of `stream` (ids of all held-out documents, [num tokens]), evenly spaced, without
    overlap.

    Errors: ValueError if the stream is too short.
    """
    stride = (stream.size - 1) // num_windows
    if stride < seq_length:
        raise ValueError(
            f"{stream.size} held-out tokens are too few for {num_windows} windows of {seq_length}: "
            "use more text, or fewer windows"
        )
    rows = np.stack([stream[i * stride : i * stride + seq_length + 1] for i in range(num_windows)]).astype(
        np.int64
    )
    return Windows(rows[:, :-1], rows[:, 1:], np.ones((num_windows, seq_length), np.float32))


def shuffled_windows(windows: Windows, seed: int) -> Windows:
    """The pairs of each window in random order, 2n sequences (see above). `windows` is ordered, s even."""
    num_windows, seq_length = windows.tokens.shape
    if seq_length % 2:
        raise ValueError(f"windows of {seq_length} tokens do not consist of pairs: use an even length")
    rows = np.concatenate([windows.tokens, windows.labels])  # pairs from x0 on, then pairs from x1 on
    pairs = rows.reshape(2 * num_windows, seq_length // 2, 2)
    order = np.random.default_rng(seed).random(pairs.shape[:2]).argsort(axis=1)
    tokens = np.take_along_axis(pairs, order[..., None], axis=1).reshape(2 * num_windows, seq_length)
    labels = np.roll(tokens, -1, axis=1)
    loss_mask = np.zeros(tokens.shape, np.float32)
    loss_mask[:, 0::2] = 1  # where the next token is the second of the same pair
    return Windows(tokens, labels, loss_mask)
