"""Multi-head latent attention: Megatron's, with the norms exactly where DeepSeek-V3 has them, and with a cache."""

from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from dsv3_megatron.backends.latent_attention import LatentPages, attend, rotate

__all__ = ["LATENT_EPSILON", "DSV3SelfAttention", "LatentCache", "ReferenceSelfAttention"]

# Of the norms on compressed queries, keys and values, whatever --norm-epsilon is: the released code and transformers
# build these two without the configured one. Equal in DeepSeek's models; Moonlight's other norms have 1e-5.
LATENT_EPSILON = 1e-6


class LatentCache(Protocol):
    """What attention asks of an inference context (`dsv3_megatron.inference.context`)."""

    def is_static_batching(self) -> bool:
        """False: the cache is paged."""

    def layer_cache(self, layer: int) -> Tensor:
        """[pages, page size, rank + rope] of a layer, counted from 0 on this pipeline stage."""

    def pages(self, rotary_embedding: Any) -> LatentPages:
        """Where the tokens of this forward pass stand."""


class DSV3SelfAttention(MLASelfAttention):
    """MLA that builds the norms and up projections which the spec names, and those norms with `LATENT_EPSILON`.

    Megatron chooses them by its own rules, and those want a norm in front of an uncompressed query too, which
    DeepSeek's models without query compression (q_lora_rank none) do not have.

    With an inference context it reads and writes the cache of latents, absorbed in every phase. Megatron's own way to
    do that wants TE's fused norm, takes `linear_kv_up_proj` out of the module, expands a layer's whole cache in each
    prefill, and fails under sequence parallelism; here the up projections are views of the weight at each call, so
    they follow whatever changes it, and the module's state is that of training.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Transformer Engine has them inside the up projections.
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            module = getattr(self, name, None)
            if module is not None and hasattr(module, "eps"):
                module.eps = LATENT_EPSILON

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: LatentCache | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; hidden_states [s, b, h], or [t, 1, h] (t / TP with sequence parallelism) with a context."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, key_value_states, **more)
        if inference_context.is_static_batching():
            raise ValueError("static batching caches keys and values, not latents: use the dynamic engine")
        return self._cached_forward(hidden_states, inference_context)

    def _cached_forward(self, hidden_states: Tensor, context: LatentCache) -> tuple[Tensor, Tensor | None]:
        config = self.config
        pages = context.pages(self.rotary_pos_emb)
        cache = context.layer_cache(self._layer_of_stage)
        q_compressed, kv = self._qkv_down_projection(hidden_states)
        compressed, key = self._latents(kv)
        query = self._query(q_compressed)
        plain, rotary = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        rotated = rotate(torch.cat([rotary, key.unsqueeze(1)], dim=1), pages.cos, pages.sin)
        latents = torch.cat([compressed, rotated[:, -1]], dim=-1)
        cache.view(-1, cache.size(-1)).index_copy_(0, pages.slots, latents)
        up_k, up_v = self._absorbed_weights()
        absorbed = torch.bmm(plain.transpose(0, 1), up_k).transpose(0, 1)  # [t, n, rank]
        query = torch.cat([absorbed, rotated[:, :-1]], dim=-1)
        core = attend(query, cache, pages, self.softmax_scale, config.kv_lora_rank)
        values = torch.bmm(core.transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1)  # [t, n, v]
        return self.linear_proj(values.flatten(1).unsqueeze(1))

    @cached_property
    def _layer_of_stage(self) -> int:
        """Number of the layer from 0 on this pipeline stage."""
        return self.layer_number - 1 - self._get_pp_layer_offset_for_inference()

    def _latents(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """kv [t, 1, rank + rope] of this rank's tokens → normed latents [t, rank], keys to rotate [t, rope] of all."""
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        compressed, key = kv.split(sizes, dim=-1)
        compressed = self._normed(compressed)
        if self.config.sequence_parallel and self.tp_group.size() > 1:
            both = torch.cat([compressed, key], dim=-1)
            compressed, key = gather_from_sequence_parallel_region(both, group=self.tp_group).split(
                sizes, dim=-1
            )
        return compressed.squeeze(1), key.squeeze(1)

    def _normed(self, compressed: Tensor) -> Tensor:
        """The norm of the compressed keys and values, wherever the backend keeps its weight."""
        if not isinstance(self.kv_layernorm, IdentityOp):
            return self.kv_layernorm(compressed)
        weight = self.linear_kv_up_proj.layer_norm_weight
        wide = compressed.to(torch.promote_types(compressed.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + LATENT_EPSILON)
        return (normed * weight).to(compressed.dtype)

    def _absorbed_weights(self) -> tuple[Tensor, Tensor]:
        """Views of the up projection: keys [n, qk head dim, rank], values [n, v head dim, rank]."""
        config = self.config
        weight = self.linear_kv_up_proj.weight.view(
            -1, config.qk_head_dim + config.v_head_dim, config.kv_lora_rank
        )
        up_k, up_v = weight.split([config.qk_head_dim, config.v_head_dim], dim=1)
        return up_k, up_v

    def _query(self, compressed: Tensor) -> Tensor:
        """[t, n, qk head dim + rope] of all tokens."""
        if self.config.q_lora_rank is None:
            query, _ = self.linear_q_proj(compressed)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(compressed))
        return query.view(query.size(0), -1, self.q_head_dim)


class ReferenceSelfAttention(DSV3SelfAttention):
    """MLA whose down projections may be of any class.

    Megatron accepts only classes it knows there. So it is given its own ColumnParallelLinear, which is then
    replaced by the spec's layer under the same name.
    """

    def __init__(
        self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, *args: Any, **kwargs: Any
    ):
        accepted = replace(
            submodules, linear_q_down_proj=ColumnParallelLinear, linear_kv_down_proj=ColumnParallelLinear
        )
        super().__init__(config, accepted, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = self._down_proj(submodules.linear_q_down_proj, config.q_lora_rank)
        kv_size = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = self._down_proj(submodules.linear_kv_down_proj, kv_size)

    def _down_proj(self, layer_class: Any, output_size: int) -> Any:
        config = self.config
        return layer_class(
            config.hidden_size,
            output_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            tp_group=self.pg_collection.tp,
        )
