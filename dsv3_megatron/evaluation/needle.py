"""Needle in a haystack: a number in one sentence of an unrelated text, asked for at its end."""

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation.documents import written

__all__ = ["documents", "grid", "lengths_up_to"]

ROOM = 24  # tokens of the context that are left for the answer
SHORTEST, MOST = 64, 6
TRIES = 12  # sentences that may be too long for what is left, before the haystack is full
SUBJECTS = ("lighthouse", "library", "bakery", "workshop", "harbour", "clock tower", "mill", "orchard")


def lengths_up_to(max_length: int) -> tuple[int, ...]:
    """Powers of two that a context holds beside the answer, six at most, and what it holds in all."""
    most = max_length - ROOM
    powers = [SHORTEST << n for n in range(32) if SHORTEST << n < most]
    return (*powers[-(MOST - 1) :], most)


def documents(
    lengths: Sequence[int], depths: Sequence[int], max_length: int, count: Callable[[str], int]
) -> list[dict[str, Any]]:
    """A document for each length and depth, the same at every call.

    Args:
        lengths: tokens of haystack, needle and question together, at most; () for those of `lengths_up_to` that hold a
            haystack.
        depths: percent of the haystack before the needle.
        count: tokens of a text.

    Returns:
        `{"length", "depth", "tokens", "number", "text"}` each.

    Raises:
        RefusedArgument: a length does not fit in the context, or holds no haystack.
    """
    for length in lengths:
        if length > max_length - ROOM:
            raise RefusedArgument(
                f"--needle-lengths {length}: the context of {max_length} tokens has room for {max_length - ROOM}"
            )
    for depth in depths:
        if not 0 <= depth <= 100:
            raise RefusedArgument(f"--needle-depths {depth}: percent of the haystack, from 0 to 100")
    chosen = lengths or lengths_up_to(max_length)
    made = [_document(length, depth, count) for length, depth in itertools.product(chosen, depths)]
    found = [document for document in made if document is not None]
    if not found or (lengths and len(found) < len(made)):
        shortest = min(lengths or chosen)
        raise RefusedArgument(f"--needle-lengths {shortest}: too few tokens for a haystack around the needle")
    return found


def _document(length: int, depth: int, count: Callable[[str], int]) -> dict[str, Any] | None:
    """None where the length holds no haystack."""
    rng = random.Random(f"{length} {depth}")
    subject, number = rng.choice(SUBJECTS), str(rng.randrange(10_000, 100_000))
    needle = f"The number of the {subject} is {number}."
    question = f"\n\nQuestion: What is the number of the {subject}?\nAnswer: The number of the {subject} is"
    left = length - count(needle) - count(question) - 2
    hay: list[tuple[str, int]] = []  # sentences and their tokens
    too_long = 0  # sentences in a row
    for sentence in _sentences():
        size = count(sentence) + 1
        if size > left:
            too_long += 1
            if too_long == TRIES:
                break
            continue
        hay.append((sentence, size))
        left, too_long = left - size, 0
    text = _put(hay, needle, depth) + question
    if not hay or count(text) > length:
        return None
    return {"length": length, "depth": depth, "tokens": count(text), "number": number, "text": text}


def _put(hay: list[tuple[str, int]], needle: str, depth: int) -> str:
    """The needle between two sentences, where the tokens before it are nearest to their share."""
    before = [0, *itertools.accumulate(size for _, size in hay)]
    wanted = before[-1] * depth / 100
    place = min(range(len(before)), key=lambda at: abs(before[at] - wanted))
    sentences = [sentence for sentence, _ in hay]
    return " ".join([*sentences[:place], needle, *sentences[place:]])


def _sentences() -> Iterator[str]:
    sentences = [part for row in written("en") for part in re.split(r"(?<=[.?!]) ", row["text"])]
    return itertools.cycle(sentences)


def grid(samples: Sequence[dict[str, Any]]) -> tuple[list[int], list[int], list[list[float]]]:
    """Lengths, depths, and the share found of each length (column) at each depth (row), from the harness's samples."""
    cells: dict[tuple[int, int], list[float]] = {}
    for sample in samples:
        cells.setdefault((sample["doc"]["length"], sample["doc"]["depth"]), []).append(sample["found"])
    lengths, depths = (sorted({key[place] for key in cells}) for place in (0, 1))
    nan = [float("nan")]
    table = [
        [sum(cell) / len(cell) for length in lengths for cell in [cells.get((length, depth), nan)]]
        for depth in depths
    ]
    return lengths, depths, table
