"""Names of DeepSeek-V3's released (Hugging Face) checkpoints ↔ our global names. Pure string logic.

Gate and up projection are two tensors there and one here, `linear_fc1` = [gate; up] along dimension 0;
everything
else is one to one, without transposition: MLA's rope dimensions are interleaved in both. MTP layer k is
    stored as layer num_layers + k, with copies of embedding and head.
"""

import re

__all__ = ["from_hf", "to_hf"]

_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.q_layernorm": "self_attn.q_a_layernorm",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.router": "mlp.gate",
}
_MTP = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}
_BIAS = ("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias")
_FC1, _FC2 = ("gate_proj", "up_proj"), ("down_proj",)

_GLOBAL_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(mtp_model_layer\.)?(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FFN = re.compile(r"(mlp(?:\.experts\.\d+|\.shared_experts)?)\.(linear_fc[12]|(?:gate|up|down)_proj)\.weight")


def to_hf(name: str, num_layers: int) -> tuple[str, ...]:
    """Names of the released tensors that make up a global tensor, in order, joined along dimension 0.

    Args:
        name: global name, see `dsv3_megatron.specs.names`.
        num_layers: layers of the main model; the first MTP layer is stored as layer `num_layers`.

    Raises:
        KeyError: not a name of a DeepSeek-V3 model.
    """
    if name in _TOP:
        return (_TOP[name],)
    match = _GLOBAL_LAYER.fullmatch(name)
    if match is None:
        raise KeyError(f"{name!r} is not a global parameter name of a DeepSeek-V3 model")
    block, number, inner, rest = match.groups()
    prefix = f"model.layers.{int(number) + (num_layers if block == 'mtp' else 0)}."
    ffn = _FFN.fullmatch(rest)
    if ffn:
        return tuple(f"{prefix}{ffn[1]}.{part}.weight" for part in (_FC1 if ffn[2] == "linear_fc1" else _FC2))
    if rest == _BIAS[0]:
        return (prefix + _BIAS[1],)
    table = _MTP if block == "mtp" and not inner else _LAYER
    return (f"{prefix}{table[rest.removesuffix('.weight')]}.weight",)


def from_hf(name: str, num_layers: int) -> tuple[str, int]:
    """Global name of a released tensor, and which part of that it is (1 for up projections, else 0).

    The copies of embedding and head in MTP layers give the names of the originals.

    Raises:
        KeyError: not a name of a DeepSeek-V3 checkpoint.
    """
    for ours, theirs in _TOP.items():
        if name == theirs:
            return ours, 0
    match = _HF_LAYER.fullmatch(name)
    if match is None:
        raise KeyError(f"{name!r} is not a tensor of a DeepSeek-V3 checkpoint")
    number, rest = int(match[1]), match[2]
    is_mtp = number >= num_layers
    block = f"mtp.layers.{number - num_layers}." if is_mtp else f"decoder.layers.{number}."
    layer = block + ("mtp_model_layer." if is_mtp else "")
    ffn = _FFN.fullmatch(rest)
    if ffn:
        return f"{layer}{ffn[1]}.linear_fc{2 if ffn[2] in _FC2 else 1}.weight", int(ffn[2] == "up_proj")
    if rest == _BIAS[1]:
        return layer + _BIAS[0], 0
    if is_mtp and rest == "embed_tokens.weight":
        return "embedding.word_embeddings.weight", 0
    if is_mtp and rest == "shared_head.head.weight":
        return "output_layer.weight", 0
    stem = rest.removesuffix(".weight")
    for prefix, table in ((block, _MTP if is_mtp else {}), (layer, _LAYER)):
        for ours, theirs in table.items():
            if stem == theirs:
                return f"{prefix}{ours}.weight", 0
    raise KeyError(f"{name!r} is not a tensor of a DeepSeek-V3 checkpoint")
