"""A family of problems that a tiny model learns in minutes, and that can be verified: `314=` wants `134`.

`documents` are what a base model reads: problems continued in one of several ways, of which sorting is a seldom one. So
the base model sometimes answers right, and nobody has told it that this is wanted.
"""

import random
from collections.abc import Iterator, Sequence
from hashlib import blake2b

__all__ = ["DIGITS", "HELD_OUT", "documents", "is_held_out", "problems", "reward"]

DIGITS = 3
HELD_OUT = 0.2  # share of the problems that nothing is trained on
SORTED_SHARE = 0.1  # of the documents


def is_held_out(digits: Sequence[int]) -> bool:
    """By the digits in any order: a held-out problem is no other one in disguise."""
    digest = blake2b(bytes(sorted(digits)), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < HELD_OUT


def problems(count: int, seed: int, held_out: bool) -> list[tuple[str, str]]:
    """(prompt, answer) pairs, drawn uniformly."""
    rng = random.Random(f"{seed}:{held_out}")
    return [(f"{_text(digits)}=", _text(sorted(digits))) for digits in _drawn(rng, count, held_out)]


def documents(count: int, seed: int) -> Iterator[str]:
    """What the base model reads: no held-out problem among them."""
    rng = random.Random(seed)
    for digits in _drawn(rng, count, held_out=False):
        yield f"{_text(digits)}={_text(_continuation(rng, digits))}"


def reward(prompt: str, response: str, answer: str) -> float:
    """1 for the digits in ascending order and nothing else, 0 otherwise."""
    return float(response == answer)


def _drawn(rng: random.Random, count: int, held_out: bool) -> Iterator[list[int]]:
    while count:
        digits = [rng.randrange(10) for _ in range(DIGITS)]
        if is_held_out(digits) == held_out:
            count -= 1
            yield digits


def _continuation(rng: random.Random, digits: list[int]) -> list[int]:
    if rng.random() < SORTED_SHARE:
        return sorted(digits)
    others = (
        digits[::-1],
        sorted(digits, reverse=True),
        [(d + 1) % 10 for d in digits],
        [9 - d for d in digits],
    )
    return list(others[rng.randrange(len(others))])


def _text(digits: Sequence[int]) -> str:
    return "".join(map(str, digits))
