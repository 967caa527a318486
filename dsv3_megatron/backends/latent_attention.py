"""Attention over a paged cache of MLA's latents, with the up projections absorbed into queries and outputs.

A token leaves one vector in the cache of a layer, [compressed (rank) ‖ rotated key (rope)], the same for all heads
(report §2.1.1). Keys and values are never expanded, whatever the step is (prefill, a chunk of one, decode, a mixture):
queries are multiplied by the keys' up projection instead, outputs by the values'.

The plain torch functions here are the definition. Where FlashMLA is installed and the shapes are its own, it takes
their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LatentPages", "attend", "flash_mla_serves", "rotate"]

SCORES_AT_ONCE = 1 << 26  # elements of the largest table of scores, so that a long prefill does not need all of it


@dataclass(frozen=True)
class LatentPages:
    """The tokens of one forward pass and where they stand in the cache; R requests, one after the other.

    Attributes:
        positions: of each token in its request, int64 [t]; t may count padded tokens after the last request.
        slots: page · page size + offset of each token in the cache, int64 [t].
        block_table: pages of each request, int32 [R, most pages]; what is beyond a request's length is not read.
        query_lengths: tokens of each request in this pass, R of them.
        kv_lengths: tokens of each request in the cache after this pass, R of them.
        cos, sin: of the rotation at `positions`, fp32 [t, rope / 2].
    """

    positions: Tensor
    slots: Tensor
    block_table: Tensor
    query_lengths: Sequence[int]
    kv_lengths: Sequence[int]
    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs: x [t, …, rope] with cos, sin [t, rope / 2].

    The first of all pairs come first in the result, then the second ones, as in Megatron and transformers; queries and
    keys agree.
    """
    shape = (x.size(0), *(1,) * (x.dim() - 2), -1)
    cos, sin = cos.view(shape).to(x.dtype), sin.view(shape).to(x.dtype)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(query: Tensor, cache: Tensor, pages: LatentPages, scale: float, rank: int) -> Tensor:
    """softmax(query · latentᵀ · scale, causal) · latent's compressed part, for every request of the pass.

    Args:
        query: absorbed queries [t, n, rank + rope].
        cache: one layer's, [pages, page size, rank + rope], with this pass's tokens in it already.
        scale: of the scores; MLA's, mscale² / √(qk head dim + rope).
        rank: size of the compressed part.

    Returns:
        [t, n, rank] in the query's dtype; 0 for padded tokens.
    """
    run = _flash_mla if flash_mla_serves(query, cache, rank) else _torch
    output = query.new_zeros(query.size(0), query.size(1), rank)
    start = request = 0
    while request < len(pages.query_lengths):
        # Requests in a row with equally many tokens go together: all of a decode step.
        length, first = pages.query_lengths[request], request
        while request < len(pages.query_lengths) and pages.query_lengths[request] == length:
            request += 1
        end = start + (request - first) * length
        if length:
            rows = query[start:end].unflatten(0, (request - first, length))
            group = slice(first, request)
            output[start:end] = run(
                rows, cache, pages.block_table[group], pages.kv_lengths[group], scale, rank
            ).flatten(0, 1)
        start = end
    return output


def _torch(
    query: Tensor, cache: Tensor, block_table: Tensor, kv_lengths: Sequence[int], scale: float, rank: int
) -> Tensor:
    """The definition: query [r, q, n, d], the last query at the last cached token → [r, q, n, rank]."""
    num_requests, num_queries, heads, _ = query.shape
    page_size = cache.size(1)
    most = max(kv_lengths)
    table = block_table[:, : -(-most // page_size)].clamp(min=0).long()
    latents = cache[table].flatten(1, 2)[:, :most]  # [r, k, d], a copy of these requests' latents alone
    lengths = torch.tensor(kv_lengths, device=query.device)
    key = torch.arange(most, device=query.device)
    if min(kv_lengths) != most:
        # What other requests left behind a shorter one's end might be inf or nan, and 0 · nan is nan.
        latents = latents.masked_fill((key >= lengths[:, None]).unsqueeze(-1), 0)
    # Query i of a request stands at position length − q + i.
    last_key = lengths[:, None] - num_queries + torch.arange(num_queries, device=query.device)  # [r, q]
    output = query.new_empty(num_requests, num_queries, heads, rank)
    step = max(1, SCORES_AT_ONCE // (num_requests * heads * most))
    for begin in range(0, num_queries, step):
        part = slice(begin, begin + step)
        count = len(range(num_queries)[part])
        rows = query[:, part].flatten(1, 2)  # [r, q·n, d]
        scores = torch.bmm(rows, latents.transpose(1, 2)).unflatten(1, (count, heads))
        if num_queries > 1 or min(kv_lengths) != most:
            hidden = key > last_key[:, part].unsqueeze(-1)  # [r, q, k]
            scores = scores.masked_fill(hidden.unsqueeze(2), float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores.to(wide) * scale, dim=-1).to(query.dtype)
        output[:, part] = torch.bmm(weights.flatten(1, 2), latents[..., :rank]).unflatten(1, (count, heads))
    return output


def flash_mla_serves(query: Tensor, cache: Tensor, rank: int) -> bool:
    """Whether FlashMLA is there and made for these tensors: on a Hopper GPU, 16 bits, 512 + 64, pages of 64."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and (rank, query.size(-1), cache.size(1)) == (512, 576, 64)
        and _flash_mla_functions() is not None
    )


def _flash_mla_functions() -> tuple[Any, Any] | None:
    """FlashMLA's kernel and its planner as Megatron imports them, None without the package."""
    from megatron.core.transformer import attention

    if attention.flash_mla_with_kvcache is None:
        return None
    return attention.flash_mla_with_kvcache, attention.get_mla_metadata


def _flash_mla(
    query: Tensor, cache: Tensor, block_table: Tensor, kv_lengths: Sequence[int], scale: float, rank: int
) -> Tensor:
    """The same by FlashMLA: all heads' queries read one key head, the last query aligned with the last key."""
    functions = _flash_mla_functions()
    assert functions is not None
    kernel, plan = functions
    lengths = torch.tensor(kv_lengths, dtype=torch.int32, device=query.device)
    schedule, num_splits = plan(lengths, query.size(1) * query.size(2), 1)
    output, _ = kernel(
        query.contiguous(),
        cache.unsqueeze(-2),
        block_table,
        lengths,
        rank,
        schedule,
        num_splits,
        softmax_scale=scale,
        causal=True,
    )
    return output
