"""Megatron's dynamic context with a cache of latents, also for the MTP layer that drafts."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from dsv3_megatron import cpu
from dsv3_megatron.backends.latent_attention import LatentPages, page_groups

__all__ = ["PAGE_SIZE", "LatentContext"]

PAGE_SIZE = 64  # tokens; FlashMLA's, and all that Megatron accepts for latents


class LatentContext(DynamicInferenceContext):
    """Pages of latents: [layers of this stage (+ drafting layers), pages, 64, kv_lora_rank + rope], nothing else.

    Megatron's `cache_mla_latents` makes it keep latents, but refuses to train with a model whose config says so. Here
    only the context sees it set.

    Attributes:
        num_draft_layers: MTP layers of this stage that draft; each has a layer of the cache of its own.
        seeds: of the requests' sampling, by request id.
        following_prompt_tokens: for a request whose prompt is processed in chunks, the token after its chunk.
        first_choices: for requests with log-probabilities of their prompt, whether each token but the first is the most
            likely one there.
    """

    if cpu.is_active():  # a padded token costs as much as another there
        TOKEN_ROUNDER = REQUEST_ROUNDER = 1

    def __init__(
        self, model_config: MLATransformerConfig, inference_config: InferenceConfig, num_draft_layers: int = 0
    ):
        self.num_draft_layers = num_draft_layers
        self.seeds: dict[int, int] = {}
        self.following_prompt_tokens: dict[int, int] = {}
        self.first_choices: dict[int, list[bool]] = {}
        self._draft_layer: int | None = None
        with_latents = copy.copy(model_config)
        with_latents.cache_mla_latents = True
        super().__init__(with_latents, inference_config)

    def _allocate_memory_buffer(self) -> None:
        self.memory_buffer = torch.empty(
            (
                self.num_attention_layers + self.num_draft_layers,
                self.kv_block_allocator.total_count,
                self.block_size_tokens,
                self.kv_reduced_dim,
            ),
            dtype=self.params_dtype,
            device=torch.cuda.current_device(),
        )
        self._rotation: tuple[Tensor, Tensor] | None = None  # cos, sin [max sequence length, rope / 2]
        self._pages: LatentPages | None = None

    def add_request(self, req: DynamicInferenceRequest, prefill_chunk_length: int | None = None) -> None:
        super().add_request(req, prefill_chunk_length)
        rest = req.remaining_prompt_tokens
        self.following_prompt_tokens.pop(req.request_id, None)
        if prefill_chunk_length is not None and prefill_chunk_length < len(rest):
            self.following_prompt_tokens[req.request_id] = int(rest[prefill_chunk_length])

    def initialize_attention_state(self, **options: Any) -> Any:
        self._pages = None
        return super().initialize_attention_state(**options)

    @property
    def active_slice(self) -> slice:
        """Rows of the requests of this step in the context's tables."""
        return slice(self.paused_request_count, self.total_request_count)

    def pages(self, rotary_embedding: Any) -> LatentPages:
        """Where this step's tokens stand; all layers rotate alike, so the first one's embedding serves."""
        if self._pages is None:
            cos, sin = self._rotation_of(rotary_embedding)
            tokens = slice(0, self.padded_active_token_count)
            view = self.gpu_view
            positions = view.token_to_position_in_request[tokens].long()
            offsets = view.token_to_local_position_within_kv_block[tokens]
            lengths = self.request_query_lengths[self.active_slice]
            cached = self.request_kv_length_offsets[self.active_slice] + lengths
            table = view.mha_block_table[: len(lengths)]
            self._pages = LatentPages(
                slots=view.token_to_block_idx[tokens] * self.block_size_tokens + offsets,
                groups=page_groups(lengths.tolist(), cached.tolist(), table, self.block_size_tokens),
                cos=cos[positions],
                sin=sin[positions],
            )
        return self._pages

    def halves(self, rotary_embedding: Any, at: int) -> list[LatentPages]:
        """Where the tokens of this step before `at` stand, and those from there on; a request may be cut."""
        whole = self.pages(rotary_embedding)
        lengths = self.request_query_lengths[self.active_slice]
        cached = self.request_kv_length_offsets[self.active_slice] + lengths
        starts = lengths.cumsum(0) - lengths
        first = torch.minimum(lengths, (at - starts).clamp(min=0))
        table = self.gpu_view.mha_block_table[: len(lengths)]
        return [
            LatentPages(
                slots=whole.slots[tokens],
                groups=page_groups(queries.tolist(), keys.tolist(), table, self.block_size_tokens),
                cos=whole.cos[tokens],
                sin=whole.sin[tokens],
            )
            for tokens, queries, keys in (
                (slice(0, at), first, cached - (lengths - first)),
                (slice(at, None), lengths - first, cached),
            )
        ]

    @contextmanager
    def standing(self, pages: LatentPages) -> Iterator[None]:
        """Attention takes a part of this step's tokens for all of them."""
        self._pages, whole = pages, self._pages
        try:
            yield
        finally:
            self._pages = whole

    def _rotation_of(self, rotary_embedding: Any) -> tuple[Tensor, Tensor]:
        if self._rotation is None:
            # Megatron keeps these tables for the next caller, who may be training: no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                angles = rotary_embedding(self.max_sequence_length)
                angles, scale = angles if isinstance(angles, tuple) else (angles, 1.0)
                half = angles.flatten(1)[:, : angles.size(-1) // 2]
                cos, sin = half.cos() * scale, half.sin() * scale
                self._rotation = (cos.to(self.params_dtype), sin.to(self.params_dtype))
        return self._rotation

    def layer_cache(self, layer: int) -> Tensor:
        """[pages, 64, rank + rope] of a decoder layer of this stage, or of the layer that drafts."""
        if self._draft_layer is not None:
            layer = self.num_attention_layers + self._draft_layer
        return self.memory_buffer[layer]

    @contextmanager
    def drafting(self, layer: int) -> Iterator[None]:
        """Attention reads and writes the cache of MTP layer `layer` (from 0), for the same tokens."""
        self._draft_layer = layer
        try:
            yield
        finally:
            self._draft_layer = None

    @property
    def bytes_per_token(self) -> int:
        """Of this stage's cache, drafting layers included."""
        layers, _, _, width = self.memory_buffer.shape
        return layers * width * self.memory_buffer.element_size()
