"""Multi-head latent attention: Megatron's, with the norms exactly where DeepSeek-V3 has them."""

from dataclasses import replace
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig

__all__ = ["LATENT_EPSILON", "DSV3SelfAttention", "ReferenceSelfAttention"]

# Of the norms on compressed queries, keys and values, whatever --norm-epsilon is: the released code and transformers
# build these two without the configured one. Equal in DeepSeek's models; Moonlight's other norms have 1e-5.
LATENT_EPSILON = 1e-6


class DSV3SelfAttention(MLASelfAttention):
    """MLA that builds the norms and up projections which the spec names, and those norms with `LATENT_EPSILON`.

    Megatron chooses them by its own rules, and those want a norm in front of an uncompressed query too, which
    DeepSeek's models without query compression (q_lora_rank none) do not have.
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
