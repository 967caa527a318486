"""The reference backend: plain PyTorch and Megatron's local modules; runs anywhere."""

from dsv3_megatron.backends.attention import SDPACoreAttention
from dsv3_megatron.backends.backend import Backend
from dsv3_megatron.backends.experts import routed_experts
from dsv3_megatron.backends.linear import ColumnLinear, DuplicatedLinear, RowLinear
from dsv3_megatron.backends.mla import ReferenceSelfAttention
from dsv3_megatron.backends.moe import ReferenceMoELayer
from dsv3_megatron.backends.norm import RMSNorm
from dsv3_megatron.patching import install

__all__ = ["BACKEND"]

# Recompute without Transformer Engine and without a compiler.
install(["recompute_without_te", "share_storage"])

# Transformer Engine fuses these norms into the linear layers after them; save under the same keys.
_ATTENTION_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}

BACKEND = Backend(
    norm=RMSNorm,
    self_attention=ReferenceSelfAttention,
    core_attention=SDPACoreAttention,
    column=ColumnLinear,
    row=RowLinear,
    attention_output=RowLinear,
    down_projection=RowLinear,
    duplicated=DuplicatedLinear,
    norm_column=None,
    routed_experts=routed_experts(),
    moe_layer=ReferenceMoELayer,
    dense_keys={**_ATTENTION_KEYS, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    moe_keys=_ATTENTION_KEYS,
)
