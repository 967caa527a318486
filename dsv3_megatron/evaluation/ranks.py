"""One rank leads an evaluation: it has tasks, texts and results. The others compute what it asks for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dsv3_megatron.evaluation.scorer import Request, Row, Score, Scorer

__all__ = ["LEADER", "Leader", "follow", "leading"]

LEADER = 0  # rank


class Leader:
    """The scorer of all ranks, as rank 0 calls it; the others are in `follow`."""

    def __init__(self, scorer: Scorer):
        self._scorer = scorer
        self.max_length, self.num_at_once, self.samples = (
            scorer.max_length,
            scorer.num_at_once,
            scorer.samples,
        )

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Scores in the order of the rows."""
        return self._all("score", rows)

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """New tokens in the order of the requests."""
        return self._all("generate", requests)

    def _all(self, what: str, given: Sequence[Any]) -> list[Any]:
        _broadcast((what, list(given)))
        found: dict[int, Any] = {}
        for part in _gathered(getattr(self._scorer, what)(given)) or []:
            found |= part
        return [found[place] for place in range(len(given))]


@contextmanager
def leading(scorer: Scorer) -> Iterator[Leader]:
    """On rank 0: the others follow as long, also where the evaluation ends with an error."""
    try:
        yield Leader(scorer)
    finally:
        _broadcast(None)


def follow(scorer: Scorer) -> None:
    """On every other rank: compute what rank 0 asks for until it is done."""
    while (call := _broadcast(None)) is not None:
        what, given = call
        _gathered(getattr(scorer, what)(given))


def _broadcast(value: Any) -> Any:
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=LEADER)
    return box[0]


def _gathered(value: Any) -> list[Any] | None:
    import torch.distributed as dist

    everyone = [None] * dist.get_world_size() if dist.get_rank() == LEADER else None
    dist.gather_object(value, everyone, dst=LEADER)
    return everyone
