"""What an evaluation asks of a model, in token ids; no torch, no Megatron."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Request", "Row", "Score", "Scorer"]


@dataclass(frozen=True)
class Row:
    """Tokens of which the last `num_scored` are scored, each after all before it."""

    tokens: tuple[int, ...]
    num_scored: int


@dataclass(frozen=True)
class Score:
    """Of a `Row`.

    Attributes:
        log_prob: of the scored tokens together, natural logarithm.
        greedy: whether each of them is the most likely one.
    """

    log_prob: float
    greedy: bool


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    Attributes:
        stop: strings that end the answer, searched for in its text with special tokens written out.
        temperature: 0 is greedy.
        top_k, top_p: 0 and 1 for no limit.
        number: of equal requests that are sampled, so that each has random numbers of its own.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    number: int = 0


class Scorer(Protocol):
    """A model that is called on all ranks together, with the same arguments.

    Attributes:
        max_length: tokens of the model's input, at most; a row may have one more, which is only scored.
        num_at_once: rows or requests of a call that keep all ranks busy.
        samples: whether a request may have a temperature.
    """

    max_length: int
    num_at_once: int
    samples: bool

    def score(self, rows: Sequence[Row]) -> dict[int, Score]:
        """By place in `rows`, those that this rank has computed; all ranks together have all."""

    def generate(self, requests: Sequence[Request]) -> dict[int, list[int]]:
        """New tokens by place in `requests`, with the one that ended the answer; divided like `score`."""
