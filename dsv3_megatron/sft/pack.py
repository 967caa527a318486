"""Samples into rows of a fixed length (report §5.1: packed, with sample masking)."""

import random
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int, seed: int = 0, look_back: int = 64) -> list[list[int]]:
    """Sample indices of each row.

    Samples are taken in a random order and put into the fullest of the last `look_back` open rows that has room, so
    that rows stay mixtures and little is left empty. How DeepSeek packs is unpublished.

    Args:
        lengths: tokens of each sample, at most `row_length`.

    Raises:
        ValueError: a sample is longer than a row.
    """
    if lengths and max(lengths) > row_length:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a row of {row_length}")
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # row, its room
    for sample in order:
        fitting = [(room, place) for place, (_, room) in enumerate(open_rows) if room >= lengths[sample]]
        if fitting:
            _, place = min(fitting)
            row, room = open_rows.pop(place)
        else:
            row, room = len(rows), row_length
            rows.append([])
        rows[row].append(sample)
        open_rows.append((row, room - lengths[sample]))
        open_rows = open_rows[-look_back:]
    return rows
