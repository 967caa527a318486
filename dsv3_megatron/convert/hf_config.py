"""config.json of the family ↔ the fields of an `Architecture`. Every key has one of four fates, or is refused:

read      it becomes a field, and so part of Megatron's model and of the printed and recorded arguments
fixed     another value is another model, which is refused by name
inert     it cannot change what the model computes (`INERT`, by name)
rope      see `dsv3_megatron.convert.rope`

The family: `deepseek_v3` (V3, V3.1, R1, Moonlight), `kimi_k2` (the same fields), and `deepseek_v2` as far as Megatron's
router has its gate (V2-Lite: softmax over all experts, the best K of them, no groups).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.rope import ROPE_KEYS, rope_from_hf, rope_to_hf
from dsv3_megatron.specs.routing import check_routing

__all__ = ["FAMILIES", "INERT", "Family", "family_of", "fields_from_hf", "fields_to_hf"]


@dataclass(frozen=True)
class Family:
    """What the models of one `model_type` have in common.

    Attributes:
        score_function: of the router, as Megatron calls it.
        fixed: keys that have one possible value, which also stands for an absent key.
        architecture: name of the class in `architectures`.
    """

    score_function: str
    fixed: Mapping[str, Any]
    architecture: str


_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_V3 = Family(
    "sigmoid",
    _FIXED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "DeepseekV3ForCausalLM",
)
_V2 = Family(
    "softmax",
    _FIXED | {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "mlp_bias": False},
    "DeepseekV2ForCausalLM",
)
FAMILIES = {"deepseek_v3": _V3, "kimi_k2": _V3, "deepseek_v2": _V2}
# Why another value is refused, where that is not plain.
_REASONS = {
    ("topk_method", "group_limited_greedy"): "it scores a group by its best expert, Megatron by the sum of its best",
    ("attention_bias", True): "the projections of DeepSeek's attention have no bias",
    ("norm_topk_prob", False): "Megatron's router always normalises sigmoid scores",
    ("norm_topk_prob", True): "the released softmax gate then leaves out routed_scaling_factor, transformers does not",
    ("rope_interleave", False): "Megatron's MLA has the rotary dimensions in pairs, as released",
}  # fmt: skip

# config.json → field of Architecture, whole numbers of at least 1.
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "num_experts",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "moe_router_topk",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
_OTHERS = (
    "model_type",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_key_value_heads",
    "q_lora_rank",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "rms_norm_eps",
    *ROPE_KEYS,
)
# Sums that transformers writes beside the fields: head_dim is its rotary dimension.
_DERIVED = {
    "head_dim": ("qk_rope_head_dim",),
    "qk_head_dim": ("qk_nope_head_dim", "qk_rope_head_dim"),
}
# transformers' other names of the same things.
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}

# What no model of the family computes with. Training has options of its own for what is about training.
INERT = frozenset(
    name
    for line in (
        "architectures auto_map torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash",
        "_attn_implementation _attn_implementation_autoset _experts_implementation torchscript quantization_config",
        "num_nextn_predict_layers",  # the tensors say it
        "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id",
        "use_cache return_dict output_attentions output_hidden_states output_router_logits output_scores",
        "return_dict_in_generate initializer_range attention_dropout aux_loss_alpha router_aux_loss_coef seq_aux",
        "ep_size pretraining_tp id2label label2id num_labels problem_type finetuning_task task_specific_params",
        "classifier_dropout tokenizer_class prefix chunk_size_feed_forward is_encoder_decoder is_decoder",
        "add_cross_attention cross_attention_hidden_size tie_encoder_decoder pruned_heads tf_legacy_loss use_bfloat16",
        "gradient_checkpointing max_length min_length do_sample early_stopping num_beams num_beam_groups",
        "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id",
        "remove_invalid_values begin_suppress_tokens suppress_tokens exponential_decay_length_penalty",
        "unsloth_version unsloth_fixed model_max_length",
    )
    for name in line.split()
)


def family_of(config: Mapping[str, Any]) -> Family:
    """Of a config.json.

    Raises:
        ConversionError: its `model_type` is none of the family.
    """
    kind = config.get("model_type", "deepseek_v3")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConversionError(f"config.json: model_type={kind!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Architecture`, all but `mtp_num_layers`, from the contents of config.json.

    Raises:
        ConversionError: a key is missing or unknown, or describes a model that Megatron's layers are not; names it.
    """
    family = family_of(config)
    if "q_lora_rank" not in config:  # null says something, and an absent key is 1536 for some readers
        raise ConversionError("config.json: q_lora_rank is missing")
    config = _without_aliases({key: value for key, value in config.items() if value is not None})
    _check_fixed(config, family)
    _check_known(config, family)
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads", heads) != heads:
        raise ConversionError(
            f"config.json: num_key_value_heads={config['num_key_value_heads']} must equal "
            f"num_attention_heads={heads}: MLA has no groups"
        )
    num_layers = _whole(config, "num_hidden_layers")
    num_dense = min(_whole(config, "first_k_dense_replace", at_least=0), num_layers)
    sizes = {field: _whole(config, key) for key, field in _SIZES.items()}
    groups = _groups(config, family)
    if num_dense < num_layers:
        try:
            check_routing(sizes["num_experts"], sizes["moe_router_topk"], *groups)
        except ValueError as error:
            raise ConversionError(
                f"config.json: n_routed_experts, num_experts_per_tok, n_group, topk_group: {error}"
            ) from error
    for key, parts in _DERIVED.items():
        wanted = sum(config[part] for part in parts)
        if config.get(key, wanted) != wanted:
            raise ConversionError(
                f"config.json: {key}={config[key]!r} must be {' + '.join(parts)} = {wanted}"
            )
    if sizes["qk_pos_emb_head_dim"] % 2:
        raise ConversionError(f"config.json: qk_rope_head_dim={sizes['qk_pos_emb_head_dim']} must be even")
    theta, yarn = rope_from_hf(config)
    return {
        **sizes,
        "num_layers": num_layers,
        "num_dense_layers": num_dense,
        "q_lora_rank": _whole(config, "q_lora_rank") if "q_lora_rank" in config else None,
        "moe_router_num_groups": groups[0],
        "moe_router_group_topk": groups[1],
        "moe_router_topk_scaling_factor": _positive(config, "routed_scaling_factor"),
        "moe_router_score_function": family.score_function,
        "rotary_base": theta,
        "layernorm_epsilon": _positive(config, "rms_norm_eps"),
        "yarn": yarn,
    }


def fields_to_hf(fields: Mapping[str, Any], model_type: str | None = None) -> dict[str, Any]:
    """The keys of config.json that describe the model, as the release has them.

    Args:
        fields: of an `Architecture`.
        model_type: taken where it is of the model's family.

    Raises:
        ConversionError: config.json has no word for such a model.
    """
    score_function = fields["moe_router_score_function"]
    if model_type not in FAMILIES or FAMILIES[model_type].score_function != score_function:
        model_type = next(
            kind for kind, family in FAMILIES.items() if family.score_function == score_function
        )
    family = FAMILIES[model_type]
    if family is _V2 and fields["mtp_num_layers"]:
        raise ConversionError(
            f"mtp_num_layers={fields['mtp_num_layers']}: {model_type} has no MTP layer; train with --mtp-num-layers 0"
        )
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **family.fixed,
        "num_hidden_layers": fields["num_layers"],
        "first_k_dense_replace": fields["num_dense_layers"],
        **{key: fields[field] for key, field in _SIZES.items()},
        "num_key_value_heads": fields["num_attention_heads"],
        "q_lora_rank": fields["q_lora_rank"],
        "n_group": fields["moe_router_num_groups"],
        "topk_group": fields["moe_router_group_topk"],
        "routed_scaling_factor": fields["moe_router_topk_scaling_factor"],
        **({} if family is _V2 else {"num_nextn_predict_layers": fields["mtp_num_layers"]}),
        **rope_to_hf(fields["rotary_base"], fields["yarn"]),
        "rms_norm_eps": fields["layernorm_epsilon"],
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _without_aliases(config: dict[str, Any]) -> dict[str, Any]:
    for alias, key in _ALIASES.items():
        if alias in config:
            value = config.pop(alias)
            if config.setdefault(key, value) != value:
                raise ConversionError(f"config.json: {alias}={value!r} and {key}={config[key]!r} disagree")
    return config


def _check_fixed(config: Mapping[str, Any], family: Family) -> None:
    for key, wanted in family.fixed.items():
        value = config.get(key, wanted)
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            reason = _REASONS.get((key, value)) if isinstance(value, str | bool) else None
            raise ConversionError(
                f"config.json: {key}={value!r} is not DeepSeek-{'V3' if family is _V3 else 'V2-Lite'} ({wanted!r})"
                + (f": {reason}" if reason else "")
            )


def _check_known(config: Mapping[str, Any], family: Family) -> None:
    unknown = config.keys() - family.fixed.keys() - _SIZES.keys() - set(_OTHERS) - _DERIVED.keys() - INERT
    if unknown:
        shown = ", ".join(f"{key}={config[key]!r}" for key in sorted(unknown))
        raise ConversionError(
            f"config.json: {shown}: not known to conversion. What does not change what the model computes may be taken "
            "out of a copy of config.json"
        )


def _groups(config: Mapping[str, Any], family: Family) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may use; (1, 1) where the gate knows none."""
    if family is _V2:  # `greedy` looks at neither
        return 1, 1
    return _whole(config, "n_group"), _whole(config, "topk_group")


def _get(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ConversionError(f"config.json: {key} is missing")
    return config[key]


def _whole(config: Mapping[str, Any], key: str, at_least: int = 1) -> int:
    value = _get(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConversionError(
            f"config.json: {key}={value!r}: a whole number of at least {at_least} is needed"
        )
    return value


def _positive(config: Mapping[str, Any], key: str) -> float:
    value = _get(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConversionError(f"config.json: {key}={value!r}: a positive number is needed")
    return float(value)
