"""Prompts, samples, and samples as packed rows: what a step of reinforcement learning is made of, without Megatron."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_megatron.data.documents import InputError
from dsv3_megatron.data.records import records
from dsv3_megatron.training.batch import PADDING

__all__ = ["Prompt", "Sample", "chosen_prompts", "mtp_weights", "read_prompts", "row_of"]


@dataclass(frozen=True)
class Prompt:
    """A problem.

    Attributes:
        tokens: ids that the response follows.
        text: what the reward sees of it.
        answer: what the reward compares with, as the file has it.
    """

    tokens: list[int]
    text: str
    answer: Any


@dataclass(frozen=True)
class Sample:
    """A response of the engine.

    Attributes:
        prompt: its number in the rollout's prompts.
        tokens: of the response, the end token included.
        log_probs: log π by the engine, of each of `tokens`.
        finished: whether it ended by itself.
        reward: by the reward function, or what stands in for it.
        routing: experts of each token of prompt and response but the last, int16 [tokens − 1, MoE layers, K], where
            they are recorded.
    """

    prompt: int
    tokens: list[int]
    log_probs: list[float]
    finished: bool
    reward: float
    routing: Tensor | None = None

    @property
    def usable(self) -> bool:
        """Whether the engine computed numbers; otherwise nothing is learnt from the sample."""
        return bool(self.tokens) and bool(np.isfinite(self.log_probs).all())


def read_prompts(
    file: Path, encode: Callable[[str], list[int]], render: Callable[[list[Any]], list[int]]
) -> list[Prompt]:
    """All problems of a file of JSON Lines or JSON: {"prompt": text or messages, "answer": anything}.

    Args:
        encode: text to ids, with the begin token.
        render: messages to ids, up to where the answer begins.

    Raises:
        ValueError: names file, line and key.
    """
    found = []
    try:
        for record in records(file):
            value = record.value
            if "prompt" not in value:
                raise ValueError(
                    f"{record.where}: no key 'prompt'; the keys are {', '.join(map(repr, value)) or 'none'}"
                )
            given = value["prompt"]
            if not (isinstance(given, str | list) and given):
                raise ValueError(f"{record.where}: prompt is neither text nor messages, or empty")
            try:
                tokens = encode(given) if isinstance(given, str) else render(given)
            except ValueError as error:
                raise ValueError(f"{record.where}: prompt: {error}") from None
            text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            found.append(Prompt(tokens, text, value.get("answer")))
    except InputError as error:
        raise ValueError(str(error)) from None
    if not found:
        raise ValueError(f"{file}: no prompts")
    return found


def chosen_prompts(count: int, per_rollout: int, rollout: int, seed: int) -> list[int]:
    """Which of `count` prompts the rollout with this number has: epochs, each in a random order of its own."""
    numbers = []
    for place in range(rollout * per_rollout, (rollout + 1) * per_rollout):
        epoch, at = divmod(place, count)
        numbers.append(int(np.random.default_rng([seed, epoch]).permutation(count)[at]))
    return numbers


def row_of(
    sequences: Sequence[tuple[int, list[int], int]],
    seq_length: int,
    pad_id: int,
    mtp: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """A row of packed samples, in the form of `sft.dataset.PackedRows` with `sequence`.

    Args:
        sequences: (number, −1 for one that is not learnt from; ids of prompt and response; length of the prompt).
        mtp: `loss_mask` from `sequence`; None: zeros, the MTP layer does not learn.

    Raises:
        ValueError: they do not fit.
    """
    used = sum(len(ids) for _, ids, _ in sequences)
    if used > seq_length:
        raise ValueError(f"samples of {used} tokens do not fit into a row of {seq_length}")
    tokens = torch.full((seq_length,), pad_id, dtype=torch.int64)
    positions = torch.full((seq_length,), PADDING, dtype=torch.int64)
    sequence = torch.full((seq_length,), -1, dtype=torch.int64)
    bounds, at = [0], 0
    for number, ids, prompt in sequences:
        end = at + len(ids)
        tokens[at:end] = torch.tensor(ids)
        positions[at:end] = torch.arange(len(ids))
        sequence[at + prompt - 1 : end - 1] = number  # where the label is the response's
        bounds.append(end)
        at = end
    if at < seq_length:
        bounds.append(seq_length)
    cu_seqlens = torch.full((seq_length + 1,), seq_length, dtype=torch.int32)
    cu_seqlens[: len(bounds)] = torch.tensor(bounds, dtype=torch.int32)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1),
        "loss_mask": torch.zeros(seq_length) if mtp is None else mtp(sequence),
        "position_ids": positions,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": cu_seqlens.diff().max(),
        "sequence": sequence,
    }


def mtp_weights(sequence: Tensor, reduction: str) -> Tensor:
    """What the MTP layer's loss weighs tokens by, so that it is the same mean as the policy's: int64 [s] → fp32 [s]."""
    inside = (sequence >= 0).float()
    if reduction == "token":
        return inside
    _, places, lengths = sequence.unique(return_inverse=True, return_counts=True)
    return inside / lengths[places]
