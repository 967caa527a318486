"""A `Scorer` over the inference engine: continuous batching, pages, tensor, pipeline and expert parallelism."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from dsv3_megatron.evaluation.scorer import Request, Row, Score
from dsv3_megatron.inference import Engine, Sampling

__all__ = ["EngineScorer"]

BATCHES = 4  # given to the engine at once


class EngineScorer:
    """Data-parallel ranks take every n-th row; the ranks of a replica have the same ones.

    Args:
        engine: whose `max_length` is one more than the model's input, and whose `decode` writes special tokens out.
        max_length: tokens of the model's input.
    """

    samples = True

    def __init__(self, engine: Engine, max_length: int):
        from megatron.core import parallel_state as groups

        assert engine.settings.max_length == max_length + 1, (engine.settings.max_length, max_length)
        self._engine, self.max_length = engine, max_length
        self._rank, self._size = groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()
        self.num_at_once = engine.settings.max_batch * self._size * BATCHES

    def _mine(self, given: Sequence[Any]) -> range:
        return range(self._rank, len(given), self._size)

    def score(self, rows: Sequence[Row]) -> dict[int, Score]:
        """See `Scorer`."""
        places = self._mine(rows)
        found = self._engine.score([rows[place].tokens for place in places])
        return {
            place: Score(
                log_prob=float(log_probs[-rows[place].num_scored :].sum()),
                greedy=bool(choices[-rows[place].num_scored :].all()),
            )
            for place, (log_probs, choices) in zip(places, found, strict=True)
        }

    def generate(self, requests: Sequence[Request]) -> dict[int, list[int]]:
        """See `Scorer`."""
        places = self._mine(requests)
        mine = [requests[place] for place in places]
        answers = self._engine.generate(
            [request.tokens for request in mine],
            [
                Sampling(
                    max_new_tokens=request.max_new_tokens,
                    temperature=request.temperature,
                    top_k=request.top_k,
                    top_p=request.top_p,
                    stop=request.stop,
                )
                for request in mine
            ],
            seeds=[_seed(request) for request in mine],
        )
        return {place: answer.tokens for place, answer in zip(places, answers, strict=True)}


def _seed(request: Request) -> int:
    """Of the request's own content: the same whatever else is evaluated, and where it was interrupted."""
    text = repr((request.tokens, request.number)).encode()
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "little")
