"""Absorbed attention over pages against keys and values expanded per head, in fp64; FlashMLA's call; TE's norm."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp

from dsv3_megatron.backends import latent_attention
from dsv3_megatron.backends.latent_attention import LatentPages, attend, page_groups
from dsv3_megatron.backends.mla import DSV3SelfAttention

RANK, ROPE, HEADS, QK, V, PAGE = 12, 4, 3, 8, 6, 4
SCALE = 0.37


class Problem:
    """Requests with cached tokens in pages scattered over a cache that is full of other things."""

    def __init__(self, query_lengths, kv_lengths, contiguous=False, rest=float("nan")):
        torch.manual_seed(0)
        self.query_lengths, self.kv_lengths = query_lengths, kv_lengths
        counts = [-(-length // PAGE) for length in kv_lengths]
        total = sum(counts) + 3
        shuffled = torch.randperm(total)
        order = torch.arange(total) if contiguous else shuffled
        self.cache = torch.full((total, PAGE, RANK + ROPE), rest, dtype=torch.float64)
        self.table = torch.full((len(kv_lengths), max(counts) + 1), -1, dtype=torch.int32)
        self.latents, taken = [], 0
        for request, (length, count) in enumerate(zip(kv_lengths, counts, strict=True)):
            own = order[taken : taken + count]
            taken += count
            self.table[request, :count] = own.int()
            latents = torch.randn(length, RANK + ROPE, dtype=torch.float64)
            self.latents.append(latents)
            self.cache[own.repeat_interleave(PAGE)[:length], torch.arange(length) % PAGE] = latents
        tokens = sum(query_lengths)
        self.plain = torch.randn(tokens, HEADS, QK, dtype=torch.float64)
        self.rotary = torch.randn(tokens, HEADS, ROPE, dtype=torch.float64)
        self.up_k = torch.randn(HEADS, QK, RANK, dtype=torch.float64)
        self.up_v = torch.randn(HEADS, V, RANK, dtype=torch.float64)

    def absorbed(self, padded=0):
        query = torch.cat([torch.einsum("tnd,ndr->tnr", self.plain, self.up_k), self.rotary], dim=-1)
        query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, padded))
        groups = page_groups(self.query_lengths, self.kv_lengths, self.table, PAGE)
        none = torch.empty(0)
        out = attend(query, self.cache, LatentPages(none, groups, none, none), SCALE, RANK)
        return torch.einsum("tnr,nvr->tnv", out, self.up_v)

    def expanded(self):
        """Keys and values of every head, dense causal attention, one request after the other."""
        outputs, start = [], 0
        for latents, count in zip(self.latents, self.query_lengths, strict=True):
            length = len(latents)
            keys = torch.cat(
                [
                    torch.einsum("kr,ndr->nkd", latents[:, :RANK], self.up_k),
                    latents[:, RANK:].expand(HEADS, -1, -1),
                ],
                dim=-1,
            )
            values = torch.einsum("kr,nvr->nkv", latents[:, :RANK], self.up_v)
            rows = slice(start, start + count)
            query = torch.cat([self.plain[rows], self.rotary[rows]], dim=-1).transpose(0, 1)
            seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            scores = (query @ keys.transpose(1, 2) * SCALE).masked_fill(~seen, float("-inf"))
            outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
            start += count
        return torch.cat(outputs)


STEPS = {
    "decode": ([1, 1, 1], [5, 9, 4]),
    "decode, equally long": ([1, 1], [8, 8]),
    "decode with a draft": ([2, 2, 2], [6, 13, 2]),
    "prefill": ([5, 9, 1], [5, 9, 1]),
    "chunk of a longer prompt": ([6], [14]),
    "mixture": ([1, 1, 2, 7, 7, 3], [11, 3, 2, 7, 12, 3]),
}


@pytest.mark.parametrize("name", STEPS)
def test_absorbed_is_expanded(name):
    problem = Problem(*STEPS[name])
    torch.testing.assert_close(problem.absorbed(), problem.expanded(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_pages_anywhere_are_pages_in_a_row(name):
    scattered, row = Problem(*STEPS[name]), Problem(*STEPS[name], contiguous=True, rest=0.0)
    assert torch.equal(scattered.absorbed(), row.absorbed())


def test_long_tables_of_scores_come_in_parts(monkeypatch):
    problem = Problem([9, 9], [9, 17])
    whole = problem.absorbed()
    monkeypatch.setattr(latent_attention, "SCORES_AT_ONCE", 2 * HEADS * 17 * 2)
    torch.testing.assert_close(problem.absorbed(), whole, rtol=1e-14, atol=1e-14)


def test_padded_tokens_get_zeros():
    problem = Problem(*STEPS["mixture"])
    assert torch.equal(problem.absorbed(padded=3)[-3:], torch.zeros(3, HEADS, V, dtype=torch.float64))


def test_a_later_key_would_be_seen():
    """The control: with a token more in the cache the same queries must answer otherwise."""
    problem = Problem([3], [7], rest=0.5)
    before = problem.absorbed()
    problem.kv_lengths = [8]
    assert not torch.allclose(problem.absorbed(), before)


def test_flash_mla_gets_what_its_contract_says(monkeypatch):
    """A kernel that keeps FlashMLA's contract, in torch: equal queries, one key head, aligned to the end."""

    def plan(cache_seqlens, queries_per_key_head, key_heads):
        assert cache_seqlens.dtype == torch.int32 and key_heads == 1 and queries_per_key_head % HEADS == 0
        return "schedule", "splits"

    def kernel(q, k_cache, block_table, seqlens, head_dim_v, schedule, splits, softmax_scale, causal):
        assert (schedule, splits, causal, k_cache.shape[2]) == ("schedule", "splits", True, 1)
        r, s, n, _ = q.shape
        out = torch.zeros(r, s, n, head_dim_v, dtype=q.dtype)
        for request, length in enumerate(seqlens.tolist()):
            pages = block_table[request, : -(-length // PAGE)].long()
            keys = k_cache[pages].flatten(0, 1).squeeze(1)[:length]
            seen = torch.ones(s, length, dtype=torch.bool).tril(length - s)
            scores = torch.einsum("snd,kd->nsk", q[request], keys) * softmax_scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[request] = torch.einsum("nsk,kv->snv", weights, keys[:, :head_dim_v])
        return out, None

    monkeypatch.setattr(latent_attention, "flash_mla_serves", lambda *args: True)
    monkeypatch.setattr(latent_attention, "_flash_mla_functions", lambda: (kernel, plan))
    problem = Problem(*STEPS["mixture"])
    torch.testing.assert_close(problem.absorbed(), problem.expanded(), rtol=1e-12, atol=1e-12)


def test_the_norm_of_the_latents_is_found_where_te_keeps_it():
    """TE fuses it into the up projection; the unfused attention would miss it."""
    compressed, weight = torch.randn(5, 1, RANK), torch.rand(RANK) + 0.5
    attention = SimpleNamespace(
        kv_layernorm=IdentityOp(),
        linear_kv_up_proj=SimpleNamespace(layer_norm_weight=weight),
        config=SimpleNamespace(layernorm_epsilon=1e-6),
    )
    wanted = torch.nn.functional.rms_norm(compressed, (RANK,), weight, 1e-6)
    torch.testing.assert_close(DSV3SelfAttention._normed(attention, compressed), wanted)
