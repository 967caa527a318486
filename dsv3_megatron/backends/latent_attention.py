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

__all__ = ["LatentPages", "PageGroup", "attend", "flash_mla_serves", "page_groups", "rotate"]

SCORES_AT_ONCE = (
    1 << 26
)  # elements of the largest table of scores, so that a long prefill does not need all of it


class PageGroup:
    """Requests in a row with equally many tokens in a forward pass; what every layer needs of them is made once.

    Attributes:
        tokens: of the group among those of the pass.
        num_requests, num_queries: the tokens are so many requests of so many tokens.
        block_table: pages of each request, int32 [r, most pages]; what is beyond a request's length is not read.
        kv_lengths: tokens of each request in the cache after this pass.
        table: the pages that are read, int64 [r, pages].
        key, last_key: positions of the cached tokens [k] and of the queries [r, q].
        left_over: bool [r, k, 1], True beyond a request's end; None where all are equally long.
        schedule: FlashMLA's plan of this group.
    """

    def __init__(
        self, start: int, num_queries: int, block_table: Tensor, kv_lengths: Sequence[int], page_size: int
    ):
        device = block_table.device
        self.num_requests, self.num_queries = len(kv_lengths), num_queries
        self.tokens = slice(start, start + self.num_requests * num_queries)
        self.block_table, self.kv_lengths = block_table, kv_lengths
        most = max(kv_lengths)
        self.table = block_table[:, : -(-most // page_size)].clamp(min=0).long()
        lengths = torch.tensor(kv_lengths, device=device)[:, None]
        self.key = torch.arange(most, device=device)
        # Query i of a request stands at position length − q + i.
        self.last_key = lengths - num_queries + torch.arange(num_queries, device=device)
        uneven = min(kv_lengths) != most
        self.left_over = (self.key >= lengths).unsqueeze(-1) if uneven else None
        self.schedule: Any = None

    def hidden(self, queries: slice) -> Tensor | None:
        """bool [r, q, k] of some queries: the key comes after the query; None where nothing does."""
        if self.num_queries > 1:
            return self.key > self.last_key[:, queries].unsqueeze(-1)
        return None if self.left_over is None else self.left_over.transpose(1, 2)


def page_groups(
    query_lengths: Sequence[int], kv_lengths: Sequence[int], block_table: Tensor, page_size: int
) -> list[PageGroup]:
    """Groups of a pass, in order; requests without tokens are left out.

    Args:
        query_lengths: tokens of each request in this pass.
        kv_lengths: tokens of each request in the cache after it.
        block_table: int32 [requests, most pages].
    """
    groups, start, request = [], 0, 0
    while request < len(query_lengths):
        length, first = query_lengths[request], request
        while request < len(query_lengths) and query_lengths[request] == length:
            request += 1
        if length:
            rows = slice(first, request)
            groups.append(PageGroup(start, length, block_table[rows], kv_lengths[rows], page_size))
        start += (request - first) * length
    return groups


@dataclass(frozen=True)
class LatentPages:
    """The tokens of one forward pass and where they stand in the cache, requests one after the other.

    Attributes:
        slots: page · page size + offset of each token in the cache, int64 [t]; t may count padded tokens at the end.
        groups: the requests they belong to.
        cos, sin: of the rotation at the tokens' positions, [t, rope / 2], of the model's dtype.
    """

    slots: Tensor
    groups: list[PageGroup]
    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs: x [t, …, rope] with cos, sin [t, rope / 2].

    The first of all pairs come first in the result, then the second ones, as in Megatron and transformers; queries and
    keys agree.
    """
    shape = (x.size(0), *(1,) * (x.dim() - 2), -1)
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = x[..., 0::2], x[..., 1::2]
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1)


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
    if len(pages.groups) == 1 and pages.groups[0].tokens == slice(0, query.size(0)):
        return run(query, cache, pages.groups[0], scale, rank)
    output = query.new_zeros(query.size(0), query.size(1), rank)
    for group in pages.groups:
        output[group.tokens] = run(query[group.tokens], cache, group, scale, rank)
    return output


def _torch(query: Tensor, cache: Tensor, group: PageGroup, scale: float, rank: int) -> Tensor:
    """The definition: [r·q, n, d] → [r·q, n, rank]; the last query of a request is at its last cached token."""
    r, q, n, most = group.num_requests, group.num_queries, query.size(1), len(group.key)
    latents = cache[group.table].flatten(1, 2)[:, :most]  # [r, k, d], a copy of these requests' latents alone
    if group.left_over is not None:
        # What other requests left behind a shorter one's end might be inf or nan, and 0 · nan is nan.
        latents = latents.masked_fill(group.left_over, 0)
    rows = query.view(r, q * n, -1)
    step = max(1, SCORES_AT_ONCE // (r * n * most))
    parts = [slice(begin, min(begin + step, q)) for begin in range(0, q, step)]
    outputs = [
        _attend_rows(rows[:, part.start * n : part.stop * n], latents, group.hidden(part), scale, rank)
        for part in parts
    ]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output.view(r * q, n, rank)


def _attend_rows(rows: Tensor, latents: Tensor, hidden: Tensor | None, scale: float, rank: int) -> Tensor:
    """rows [r, q·n, d], latents [r, k, d], hidden [r, q, k] → [r, q·n, rank]."""
    scores = torch.baddbmm(rows.new_empty(1, 1, 1), rows, latents.transpose(1, 2), beta=0, alpha=scale)
    if hidden is not None:
        scores.view(*hidden.shape[:2], -1, hidden.size(-1)).masked_fill_(hidden.unsqueeze(2), float("-inf"))
    wide = torch.promote_types(rows.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(rows.dtype)
    return torch.bmm(weights, latents[..., :rank])


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


def _flash_mla(query: Tensor, cache: Tensor, group: PageGroup, scale: float, rank: int) -> Tensor:
    """The same by FlashMLA: all heads' queries read one key head, the last query aligned with the last key."""
    functions = _flash_mla_functions()
    assert functions is not None
    kernel, plan = functions
    if group.schedule is None:
        lengths = torch.tensor(group.kv_lengths, dtype=torch.int32, device=query.device)
        group.schedule = (lengths, *plan(lengths, group.num_queries * query.size(1), 1))
    lengths, schedule, num_splits = group.schedule
    output, _ = kernel(
        query.reshape(group.num_requests, group.num_queries, *query.shape[1:]),
        cache.unsqueeze(-2),
        group.block_table,
        lengths,
        rank,
        schedule,
        num_splits,
        softmax_scale=scale,
        causal=True,
    )
    return output.flatten(0, 1)
