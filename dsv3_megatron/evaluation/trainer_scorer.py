"""A `Scorer` over a model in training: the trainer's own schedule, chunks and ranks, forward only.

Every pass has the shape of a training step (the same number of microbatches of the same size and length), so that
whatever layout trains also evaluates; places without a row are filled with padding. Answers are written without a
cache: each new token is a pass over the whole row.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.evaluation.scorer import Request, Row, Score

__all__ = ["TrainerScorer"]

EMPTY = -1  # number of a place without a row


class TrainerScorer:
    """Called on every rank, with the chunks in evaluation mode.

    Args:
        model: Megatron's model chunks of this rank.
        ends: token ids that end an answer.
        decode: token ids to text, special tokens written out; for stop strings.
    """

    samples = False

    def __init__(self, model: list[Any], ends: Sequence[int], decode: Callable[[list[int]], str]):
        from megatron.core import mpu
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training import get_args

        args = get_args()
        self._model, self._ends, self._decode = model, frozenset(ends), decode
        self.max_length, self._micro_batch = args.seq_length, args.micro_batch_size
        self._num_microbatches = get_num_microbatches()
        self._dp_rank, self._dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        self.num_at_once = self._num_microbatches * self._micro_batch * self._dp_size

    def score(self, rows: Sequence[Row]) -> dict[int, Score]:
        """See `Scorer`."""
        wanted = [(row.tokens[:-1], row.num_scored, row.tokens[-row.num_scored :]) for row in rows]
        return {
            place: Score(float(log_probs.sum()), bool(greedy.all()))
            for place, (log_probs, greedy, _) in self._passes(wanted).items()
        }

    def generate(self, requests: Sequence[Request]) -> dict[int, list[int]]:
        """See `Scorer`; the most likely token each time, on all ranks."""
        assert not any(request.temperature for request in requests)
        answers: list[list[int]] = [[] for _ in requests]
        going = list(range(len(requests)))
        while going:
            rows = [requests[place].tokens + tuple(answers[place]) for place in going]
            found = self._passes([(row, 1, (0,)) for row in rows])
            for index, token in self._on_all_ranks(
                {i: int(best[-1]) for i, (*_, best) in found.items()}
            ).items():
                answers[going[index]].append(token)
            going = [place for place in going if not self._is_done(requests[place], answers[place])]
        return dict(enumerate(answers))

    def _is_done(self, request: Request, answer: list[int]) -> bool:
        if len(answer) >= request.max_new_tokens or answer[-1] in self._ends:
            return True
        text = self._decode(answer)
        return any(stop in text for stop in request.stop)

    @staticmethod
    def _on_all_ranks(found: dict[int, int]) -> dict[int, int]:
        import torch.distributed as dist

        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        return {index: token for part in everyone for index, token in part.items()}

    def _passes(
        self, wanted: Sequence[tuple[tuple[int, ...], int, tuple[int, ...]]]
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """For each (input, n, targets): log-probabilities of the n targets after the last n tokens of the input,
        whether they are the most likely ones, and those; by place, on ranks that hold the last stage."""
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for start in range(0, len(wanted), self.num_at_once):
            places = range(start, min(start + self.num_at_once, len(wanted)))
            mine = list(places)[self._dp_rank :: self._dp_size]
            found |= self._pass({place: wanted[place] for place in mine})
        return found

    def _pass(self, rows: dict[int, Any]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        from dsv3_megatron.training.forward import run_forward

        with torch.no_grad():
            found = run_forward(
                _forward_step,
                self._model,
                partial(self._batches, rows),
                self._num_microbatches,
                collect_non_loss_data=True,
            )
        return {place: values for part in found or [] for place, values in part.items()}

    def _batches(self, rows: dict[int, Any]) -> Iterator[dict[str, Tensor]]:
        """Microbatches of `rows`: tokens, targets (−1: none), positions int64 [b, s], places int64 [b]."""
        places = [*rows, *[EMPTY] * (self._num_microbatches * self._micro_batch - len(rows))]
        for start in range(0, len(places), self._micro_batch):
            members = places[start : start + self._micro_batch]
            tokens = torch.zeros(len(members), self.max_length, dtype=torch.int64)
            targets = torch.full_like(tokens, -1)
            for line, place in enumerate(members):
                if place == EMPTY:
                    continue
                given, num, wanted = rows[place]
                tokens[line, : len(given)] = torch.tensor(given)
                targets[line, len(given) - num : len(given)] = torch.tensor(wanted)
            yield {
                "tokens": tokens,
                "targets": targets,
                "position_ids": torch.arange(self.max_length).expand_as(tokens).contiguous(),
                "places": torch.tensor(members),
            }


def _forward_step(data_iterator: Any, model: Any) -> tuple[Tensor, Callable[..., Any]]:
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    logits = model(batch["tokens"], batch["position_ids"], None)
    return logits, partial(_read, batch["targets"], batch["places"])


def _read(
    targets: Tensor, places: Tensor, logits: Tensor, non_loss_data: bool
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """What was wanted of a microbatch; `logits` are [b, s, this rank's part of the vocabulary]."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    found = {}
    for line, place in enumerate(places.tolist()):
        if place == EMPTY:
            continue
        asked = targets[line] >= 0
        # Ranks of a tensor-parallel group have the same rows, hence gather together.
        table = gather_from_tensor_model_parallel_region(logits[line][asked]).float().log_softmax(-1)
        log_probs = table.gather(1, targets[line][asked][:, None]).squeeze(1)
        found[place] = (log_probs.cpu(), (log_probs >= table.amax(-1)).cpu(), table.argmax(-1).cpu())
    return found
