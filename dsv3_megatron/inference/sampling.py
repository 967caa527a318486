"""Sampling whose random numbers depend on the request and the position alone.

A token is drawn by the Gumbel-max rule, argmax(logits / T + g), with noise g that is a hash of (the request's seed,
the position, the token). So a request gets the same tokens in whatever batch, layout or restart it runs; and since a
draft for a position sees the noise that the model will see there, the two agree as often as their distributions allow
(at least (1 − d) / (1 + d), d their total variation), where independent draws would seldom agree.
"""

import hashlib
from typing import Any

import torch
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from torch import Tensor

__all__ = ["KeyedSampling", "filtered_logits", "gumbel_noise", "request_seed"]


def request_seed(seed: int, request: int) -> int:
    """Seed of the request with this number among those that were given one seed; 63 bits."""
    digest = hashlib.blake2b(f"{seed}:{request}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel numbers of rows (seed, position): int64 [r], int64 [r] → fp32 [r, vocab_size].

    The same on every device: integer hashing, 24 bits of which make the uniform number.
    """
    row = _mixed(_mixed(seeds) + positions * _signed(0x9E3779B97F4A7C15))
    token = torch.arange(vocab_size, device=seeds.device) * _signed(0xD1B54A32D192ED03)
    bits = (_mixed(row[:, None] + token) >> 40) & 0xFFFFFF
    uniform = (bits.double() + 0.5) / (1 << 24)
    return -torch.log(-torch.log(uniform)).float()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al. 2014) on int64, whose products wrap as unsigned ones do."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def filtered_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits / temperature in fp32, -inf outside the top_k tokens, then outside the nucleus of mass top_p.

    Args:
        logits: [r, vocabulary].
        top_k, top_p: 0 for no limit; top_p 1.0 is none either.
    """
    logits = logits.float() / temperature
    if top_k:
        TorchSampling._modify_logits_for_top_k_filtering(logits, min(top_k, logits.size(-1)))
    if 0 < top_p < 1:
        TorchSampling._modify_logits_for_top_p_filtering(logits, top_p)
    return logits


class KeyedSampling(TorchSampling):
    """Megatron's sampling interface over `gumbel_noise`; `top_k` 1 is greedy, as everywhere in Megatron."""

    def sample_kernel(
        self,
        logits: Tensor,
        n: int,
        context: Any,
        *,
        gather_indices: Tensor | None = None,
        token_to_request_index: Tensor | None = None,
        output: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Sample the next token of each request, or of each token of the speculative layout."""
        rows = logits[:n] if gather_indices is None else logits[gather_indices[:n]]
        if token_to_request_index is None:
            requests = torch.arange(n)
            tokens = context.active_request_last_token_idxs[:n]
        else:
            requests = token_to_request_index.cpu()
            tokens = context.active_logit_idxs[:n].cpu()
        sampled = self.sample_at(rows, context, requests, context.token_to_pos_ids[tokens.long()] + 1)
        return sampled if output is None else output.copy_(sampled)

    def sample_at(self, rows: Tensor, context: Any, requests: Tensor, positions: Tensor) -> Tensor:
        """Sample one token per row.

        Args:
            rows: logits [r, vocabulary].
            requests: active request of each row, int64 [r] on the CPU.
            positions: where the sampled tokens will stand, int64 [r] on the CPU.
        """
        metadata = context.active_request_metadata
        if bool((metadata["top_k"][requests] == 1).all()):
            return rows.argmax(dim=-1)
        settings = zip(
            *(metadata[key][requests].tolist() for key in ("temperature", "top_k", "top_p")), strict=True
        )
        groups: dict[tuple[float, int, float], list[int]] = {}
        for row, setting in enumerate(settings):
            groups.setdefault(setting, []).append(row)
        sampled = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        for (temperature, top_k, top_p), members in groups.items():
            index = torch.tensor(members, device=rows.device)
            chosen = rows if len(groups) == 1 else rows[index]
            if top_k != 1:
                ids = context.request_ids[context.active_slice][requests[members]].tolist()
                seeds = torch.tensor([context.seeds[request] for request in ids], device=rows.device)
                noise = gumbel_noise(seeds, positions[members].to(rows.device), rows.size(-1))
                chosen = filtered_logits(chosen, temperature, top_k, top_p) + noise
            sampled[index] = chosen.argmax(dim=-1)
        return sampled
