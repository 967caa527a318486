"""A language in which something has to be found: keys are given values, and are asked for again later.

    · · A(3,7) · · · A(5,1) · · · Q(3) V(7) · · A(3,2) · · Q(3) V(2) …

`A(k,v)` is one token that gives key k the value v, `Q(k)` asks for k and is followed by the key's latest value; `·` is
one of a few filler tokens. A sequence has the same number of assignments and questions whatever its length, so that
what is asked for lies farther back in a longer one, and only attention can bring it.
"""

import numpy as np

NUM_KEYS = 8
NUM_VALUES = 8
NUM_FILLERS = 8
FIRST_KEY = NUM_FILLERS
FIRST_VALUE = FIRST_KEY + NUM_KEYS
FIRST_ASSIGNMENT = FIRST_VALUE + NUM_VALUES
VOCAB_SIZE = FIRST_ASSIGNMENT + NUM_KEYS * NUM_VALUES
ASSIGNMENTS = 20  # in each sequence
QUESTIONS = 40


def assignment(key: int, value: int) -> int:
    """The token A(key, value)."""
    return FIRST_ASSIGNMENT + key * NUM_VALUES + value


def sequence(rng: np.random.Generator, length: int) -> np.ndarray:
    """Tokens of one sequence, int64 [length]: assignments and questions at random places, filler between them."""
    tokens = rng.integers(NUM_FILLERS, size=length)
    places = np.sort(rng.choice(length // 2, size=ASSIGNMENTS + QUESTIONS, replace=False)) * 2
    asks = np.zeros(places.size, bool)
    asks[1 + rng.permutation(places.size - 1)[:QUESTIONS]] = True  # the first one gives a value
    values: dict[int, int] = {}
    for place, ask in zip(places, asks, strict=True):
        if ask:
            key = list(values)[int(rng.integers(len(values)))]
            tokens[place : place + 2] = FIRST_KEY + key, FIRST_VALUE + values[key]
        else:
            key, value = int(rng.integers(NUM_KEYS)), int(rng.integers(NUM_VALUES))
            values[key] = value
            tokens[place] = assignment(key, value)
    return tokens


def needle(rng: np.random.Generator, length: int, depth: float) -> tuple[np.ndarray, int]:
    """Tokens [length] whose last one asks for the key that was assigned at `depth` (0 the begin, 1 the end), and the
    answer's token. The other keys are assigned at random places; the rest is filler.
    """
    tokens = rng.integers(NUM_FILLERS, size=length)
    key = int(rng.integers(NUM_KEYS))
    place = round(depth * (length - 2))
    for other in range(NUM_KEYS):
        if other != key:
            tokens[rng.integers(length - 1)] = assignment(other, int(rng.integers(NUM_VALUES)))
    value = int(rng.integers(NUM_VALUES))
    tokens[place] = assignment(key, value)
    tokens[-1] = FIRST_KEY + key
    return tokens, FIRST_VALUE + value


def answers(tokens: np.ndarray) -> np.ndarray:
    """Where a token is the answer to a question: bool, the shape of `tokens` [..., length]."""
    asked = (tokens >= FIRST_KEY) & (tokens < FIRST_VALUE)
    return np.concatenate([np.zeros_like(asked[..., :1]), asked[..., :-1]], axis=-1)
