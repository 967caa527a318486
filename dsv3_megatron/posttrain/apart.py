"""Rollouts on ranks of their own (`--rollout-address`): the trainer's end. The other is `dsv3 rollouts`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.posttrain.bridge import Bridge
from dsv3_megatron.posttrain.whole_copy import WholeWeights

__all__ = ["Answer", "RolloutRanks"]


@dataclass(frozen=True)
class Answer:
    """As `inference.Generation`, as far as a rollout needs it."""

    tokens: list[int]
    log_probs: list[float]
    finish_reason: str


class RolloutRanks:
    """The other job's engine; made on every rank of the trainer, the first of which has the connection.

    Args:
        ends: token ids that end a response.

    Raises:
        RefusedArgument: nobody came to the address.
    """

    def __init__(self, trained: Sequence[Any], args: Any, ends: Sequence[int]) -> None:
        self._weights = WholeWeights(trained)
        self._bridge = Bridge(args.rollout_address, 0) if dist.get_rank() == 0 else None
        dist.barrier()  # nobody times out in the first weights while the first rank waits for the other job
        if self._bridge is not None:
            described = [(name, shape, str(dtype)) for name, shape, dtype in self._weights.described]
            self._bridge.tell(
                {
                    "max_length": args.seq_length,
                    "max_batch": args.rollout_batch,
                    "max_new_tokens": args.max_response_length,
                    "temperature": args.rollout_temperature,
                    "dtype": "bf16" if args.params_dtype == torch.bfloat16 else "fp32",
                    "ends": list(ends),
                    "weights": described,
                }
            )

    def generate(
        self, trained: Sequence[Any], prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[Answer]:
        """Responses by the weights of now; to be called on every rank, empty on all but the first."""
        if self._bridge is not None:
            self._bridge.tell({"prompts": [list(prompt) for prompt in prompts], "seeds": list(seeds)})
        for _, full in self._weights.each(trained):
            if self._bridge is not None:
                self._bridge.broadcast(full.cpu())
        if self._bridge is None:
            return []
        found = {int(i): answer for part in self._bridge.answers() for i, answer in part.items()}
        return [Answer(*found[i]) for i in range(len(prompts))]

    def end(self) -> None:
        """The last rollout was the last."""
        if self._bridge is not None:
            self._bridge.tell(None)
            self._bridge.close()
            self._bridge = None
