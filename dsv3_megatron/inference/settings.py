"""What an engine is told and what it tells: its sizes, how tokens are chosen, an answer, and counts of drafts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.errors import RefusedArgument

__all__ = ["BY_DEFAULT", "EngineSettings", "Generation", "Sampling", "Statistics"]


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine, fixed for its life.

    Attributes:
        max_length: tokens of the longest request, prompt and answer together.
        max_batch: requests that are generated at the same time; more wait. A multiple of the tensor-parallel size.
        max_step_tokens: tokens of one forward pass; longer prompts go in chunks.
        cache_bytes: of this rank's cache; None for as much as `max_batch` requests of `max_length` can fill.
        speculative: draft one token ahead with the MTP layer.
        prefix_caching: keep full pages of finished prompts for later prompts that begin alike.
        rebalance_interval: steps after which copies of experts follow the measured load; 0 for never. All ranks step
            together, so that the number of steps is the clock that they share.
        num_nodes: machines under an expert-parallel group.
    """

    max_length: int
    max_batch: int = 64
    max_step_tokens: int = 2048
    cache_bytes: int | None = None
    speculative: bool = False
    prefix_caching: bool = False
    rebalance_interval: int = 0
    num_nodes: int = 1


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 for no limit.
        top_p: 1 for no limit.
        stop: strings that end a request; they need the engine's `decode`.
        ignore_ends: go on after an end token.
        seed: request i of a `generate` call draws with `request_seed(seed, i)`.
        log_probs: also return the log-probabilities of the generated tokens (before temperature and limits).
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    ignore_ends: bool = False
    seed: int = 0
    log_probs: bool = False

    def check(self) -> None:
        """Raise `RefusedArgument` where a value is impossible."""
        for name, holds, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more, and finite"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (no limit)"),
            ("stop", all(self.stop), "no empty string"),
        ):
            if not holds:
                value = getattr(self, name)
                raise RefusedArgument(f"--{name.replace('_', '-')} {value}: must be {wanted}")


BY_DEFAULT = Sampling()


@dataclass(frozen=True)
class Generation:
    """Result of a request.

    Attributes:
        tokens: generated ids, with the one that ended it.
        finish_reason: "stop" (an end token or a stop string), "length" or "abort".
        log_probs: of `tokens`, where asked for.
        prompt_log_probs: of the prompt's tokens but the first, where asked for.
        prompt_first_choices: whether each of these tokens is the most likely one there.
        routing: experts of each token (all but the last), int [tokens, MoE layers, topk], where they are recorded.
    """

    tokens: list[int]
    finish_reason: str
    log_probs: list[float] | None = None
    prompt_log_probs: Sequence[float] = ()
    prompt_first_choices: Sequence[bool] = ()
    routing: Any = None


@dataclass(frozen=True)
class Statistics:
    """Drafts of an engine so far: how many were verified, and how many of these accepted."""

    proposed: int
    accepted: int

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that were accepted; None before the first."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a forward pass gives a request that is past its prompt."""
        return 1 + (self.acceptance or 0.0)
