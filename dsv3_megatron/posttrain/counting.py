"""A family of problems that a tiny model learns in minutes, and that can be verified: `406` wants `789`.

Count up from the last digit to 9, and stop. `documents` are what a base model reads: digits that go on at random, to
the next one more often than to others. So the base model sometimes answers right, and nobody has told it that this is
wanted.
"""

import random
from collections.abc import Iterator
from hashlib import blake2b

__all__ = ["HELD_OUT", "documents", "is_held_out", "problems", "reward"]

PROMPT = 3  # digits
LAST = "567"  # with which a problem may end
HELD_OUT = 0.25  # share of the problems that nothing is trained on
# Of a document's steps: to the next digit; to the end; to the end after a 9.
UP, STOP, STOP_AT_9 = 0.72, 0.05, 0.6


def is_held_out(prompt: str) -> bool:
    """By the digits, so that a problem is always on the same side."""
    return int.from_bytes(blake2b(prompt.encode(), digest_size=8).digest(), "big") / 2**64 < HELD_OUT


def problems(count: int, seed: int, held_out: bool) -> list[tuple[str, str]]:
    """(prompt, answer) pairs, drawn uniformly."""
    rng = random.Random(f"{seed}:{held_out}")
    found: list[tuple[str, str]] = []
    while len(found) < count:
        prompt = "".join(rng.choices("0123456789", k=PROMPT - 1)) + rng.choice(LAST)
        if is_held_out(prompt) == held_out:
            found.append((prompt, "".join(map(str, range(int(prompt[-1]) + 1, 10)))))
    return found


def documents(count: int, seed: int) -> Iterator[str]:
    """What the base model reads; none begins with a held-out problem."""
    rng = random.Random(seed)
    while count:
        text = "".join(rng.choices("0123456789", k=PROMPT))
        if is_held_out(text):
            continue
        while rng.random() >= (STOP_AT_9 if text[-1] == "9" else STOP):
            up = text[-1] != "9" and rng.random() < UP
            text += str(int(text[-1]) + 1) if up else rng.choice("0123456789")
        count -= 1
        yield text


def reward(prompt: str, response: str, answer: str) -> float:
    """1 for the digits up to 9 and nothing else, 0 otherwise."""
    return float(response == answer)
