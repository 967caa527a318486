"""Model FLOPs of DeepSeek-V3, as a pure function of the sizes.

Convention: a multiply-add counts 2; the backward pass counts twice the forward; nothing is counted for
recomputed activations, norms, activation functions, rotary embedding, softmax or the embedding lookup.
Every token passes `topk` routed experts and the shared ones. Attention is counted either *causal* (a query
meets half of the keys) or *non-causal* (all of them, as if no mask were used); both are in use, so both are
always reported with their name. With DeepSeek-V3's sizes at sequence length 4096, causal and without MTP:
0.250 TFLOP per token, the number behind the MFU of 38.9% in the ISCA paper's Table 4.
"""

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ModelSizes", "active_matmul_parameters", "flops_per_token"]


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes that determine the matrix products of a token; names as in Megatron's configuration.

    Attributes:
        num_layers: decoder layers, of which `num_moe_layers` are MoE.
        q_lora_rank: None where the query is projected directly.
        moe_shared_expert_intermediate_size: of all shared experts together; 0 for none.
        mtp_num_layers: multi-token-prediction depths, each one MoE (or, without MoE layers, dense) layer
        more.
        padded_vocab_size: rows of the output head.
    """

    num_layers: int
    num_moe_layers: int
    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    ffn_hidden_size: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int
    moe_router_topk: int
    num_moe_experts: int
    padded_vocab_size: int
    seq_length: int
    mtp_num_layers: int = 0

    @classmethod
    def from_config(cls, config: Any, padded_vocab_size: int, seq_length: int) -> "ModelSizes":
        """From an `MLATransformerConfig` (or anything with its attributes)."""
        given = {field.name: getattr(config, field.name, None) for field in fields(cls)}
        given |= {"padded_vocab_size": padded_vocab_size, "seq_length": seq_length}
        given["num_moe_layers"] = sum(_moe_layers(config))
        absent = {name: 0 for name, value in given.items() if value is None and name != "q_lora_rank"}
        return cls(**{**given, **absent})  # type: ignore[arg-type]


def _moe_layers(config: Any) -> list[bool]:
    """Whether each decoder layer is MoE; Megatron gives every n-th, or a list."""
    if not config.num_moe_experts:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(flag) for flag in frequency]


def _attention_parameters(s: ModelSizes) -> int:
    """Weights of MLA's five projections (without query compression: four)."""
    h, heads = s.hidden_size, s.num_attention_heads
    query_rows = heads * (s.qk_head_dim + s.qk_pos_emb_head_dim)
    query = h * query_rows if s.q_lora_rank is None else s.q_lora_rank * (h + query_rows)
    key_value_down = h * (s.kv_lora_rank + s.qk_pos_emb_head_dim)
    key_value_up = s.kv_lora_rank * heads * (s.qk_head_dim + s.v_head_dim)
    output = heads * s.v_head_dim * h
    return query + key_value_down + key_value_up + output


def _dense_mlp_parameters(s: ModelSizes) -> int:
    return 3 * s.hidden_size * s.ffn_hidden_size


def _moe_parameters(s: ModelSizes) -> int:
    """Router, chosen experts and shared experts of one token."""
    active = s.moe_router_topk * s.moe_ffn_hidden_size + s.moe_shared_expert_intermediate_size
    return 3 * s.hidden_size * active + s.hidden_size * s.num_moe_experts


def active_matmul_parameters(sizes: ModelSizes, *, mtp: bool = True) -> int:
    """Weights that one token is multiplied with: all but the embedding, the norms and the idle experts."""
    s = sizes
    head = s.hidden_size * s.padded_vocab_size
    total = s.num_layers * _attention_parameters(s) + head
    total += (s.num_layers - s.num_moe_layers) * _dense_mlp_parameters(s)
    total += s.num_moe_layers * _moe_parameters(s)
    if mtp:
        mlp = _moe_parameters(s) if s.num_moe_layers else _dense_mlp_parameters(s)
        projection = 2 * s.hidden_size * s.hidden_size
        total += s.mtp_num_layers * (projection + _attention_parameters(s) + mlp + head)
    return total


def flops_per_token(sizes: ModelSizes, *, causal: bool = True, mtp: bool = True) -> int:
    """FLOPs of one token of a sequence of `seq_length`, forward and backward, by the module's convention."""
    s = sizes
    num_layers = s.num_layers + (s.mtp_num_layers if mtp else 0)
    head_dims = s.qk_head_dim + s.qk_pos_emb_head_dim + s.v_head_dim  # query·key, then probability·value
    attention = num_layers * s.num_attention_heads * head_dims * s.seq_length
    return 6 * active_matmul_parameters(s, mtp=mtp) + (3 if causal else 6) * attention
