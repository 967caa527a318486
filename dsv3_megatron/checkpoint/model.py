"""The arguments that make a model what it is, and how this run's differ from those of a checkpoint.

Everything else (layout, precision, kernels, optimizer, data) may differ: the weights mean the same. A test walks the
fields of Megatron's model configuration, so that a new one has to be put on one side or the other.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["BY_DEST", "FIELDS", "OF_YARN", "Difference", "Field", "changeable", "differences"]


def _plain(value: Any, args: Namespace) -> Any:
    return value


def _number_or_none(value: Any, args: Namespace) -> Any:
    """Megatron's None for "none of it" is 0 on our command line."""
    return value or None


def _at_least_one(value: Any, args: Namespace) -> Any:
    """No groups are one group, no factor is the factor 1."""
    return 1 if value is None else value


def _pattern(value: Any, args: Namespace) -> Any:
    """1 for each MoE layer, 0 for each dense one; an integer N means one MoE layer in N."""
    layers = getattr(args, "num_layers", None)
    if isinstance(value, int) and layers is not None:
        return [int(layer % value == 0) for layer in range(layers)]
    return list(value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Field:
    """One argument of the model.

    Attributes:
        dest: Megatron's name of it.
        unrecorded: the value of a checkpoint that does not record it, which is Megatron's default.
        shapes: another value means other tensors, or tensors of another shape: it cannot be changed.
        option: as it is typed; "" for the name with hyphens.
        canonical: (value, arguments) -> a value that is equal where the models are.
    """

    dest: str
    unrecorded: Any
    shapes: bool
    option: str = ""
    canonical: Callable[[Any, Namespace], Any] = _plain

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return self.option or "--" + self.dest.replace("_", "-")

    def value(self, args: Namespace) -> Any:
        """What these arguments say, canonical."""
        return self.canonical(getattr(args, self.dest, self.unrecorded), args)


def _shape(dest: str, unrecorded: Any = None, option: str = "", canonical: Any = _plain) -> Field:
    return Field(dest, unrecorded, True, option, canonical)


def _function(dest: str, unrecorded: Any = None, option: str = "", canonical: Any = _plain) -> Field:
    return Field(dest, unrecorded, False, option, canonical)


FIELDS: tuple[Field, ...] = (
    # Tensors and their shapes.
    _shape("num_layers"),
    _shape("hidden_size"),
    _shape("ffn_hidden_size"),
    _shape("num_attention_heads"),
    _shape("multi_latent_attention", False),
    _shape("q_lora_rank", canonical=_number_or_none),
    _shape("kv_lora_rank", 32),
    _shape("qk_head_dim", 128),
    _shape("qk_pos_emb_head_dim", 64),
    _shape("v_head_dim", 128),
    _shape("num_experts", canonical=_number_or_none),
    _shape("moe_layer_freq", 1, canonical=_pattern),
    _shape("moe_ffn_hidden_size"),
    _shape("moe_shared_expert_intermediate_size", canonical=_number_or_none),
    _shape("moe_shared_expert_gate", False),
    _shape("moe_latent_size"),
    _shape("moe_router_enable_expert_bias", False),
    _shape("normalization", "LayerNorm"),
    _shape("qk_layernorm", False),
    _shape("swiglu", False),
    _shape("add_bias_linear", True, "--disable-bias-linear"),
    _shape("add_qkv_bias", False),
    _shape("untie_embeddings_and_output_weights", False),
    _shape("position_embedding_type", "learned_absolute"),
    _shape("attention_output_gate", False),
    _shape("softmax_type", "vanilla"),
    _shape("experimental_attention_variant"),
    _shape("linear_attention_freq"),
    _shape("group_query_attention", False),
    _shape("hybrid_layer_pattern"),
    _shape("heterogeneous_layers_config_path"),
    _shape("heterogeneous_layers_config_encoded_json"),
    _shape("moe_mlp_glu_interleave_size"),
    _shape("moe_shared_expert_glu_interleave_size"),
    _shape("mtp_use_repeated_layer", False),
    # A layer more or less: `--checkpoint-changes` may say so, the others stay.
    _function("mtp_num_layers", canonical=_number_or_none),
    # What is computed with them.
    _function("layernorm_epsilon", 1e-5, "--norm-epsilon"),
    _function("layernorm_zero_centered_gamma", False, "--apply-layernorm-1p"),
    _function("apply_residual_connection_post_layernorm", False),
    _function("qk_l2_norm", False),
    _function("squared_relu", False),
    _function("quick_geglu", False),
    _function("openai_gelu", False),
    _function("activation_func_clamp_value"),
    _function("glu_linear_offset", 0.0),
    _function("window_size"),
    _function("window_attn_skip_freq"),
    _function("use_mup", False),
    # Positions.
    _function(
        "rope_type", "rope", canonical=lambda value, args: value or "yarn"
    ),  # MLA's default in Megatron
    _function("rotary_base", 10000),
    _function("rotary_percent", 1.0),
    _function("rotary_interleaved", False),
    _function("rotary_seq_len_interpolation_factor"),
    _function("use_rope_scaling", False),
    _function("no_rope_freq"),
    _function("mrope_section"),
    _function("rotary_scaling_factor", 1.0),
    _function("mscale", 1.0),
    _function("mscale_all_dim", 0.0),
    _function("original_max_position_embeddings", 4096),
    _function("beta_fast", 32.0),
    _function("beta_slow", 1.0),
    # Routing.
    _function("moe_router_topk", 2),
    _function("moe_router_num_groups", canonical=_at_least_one),
    _function("moe_router_group_topk", canonical=_at_least_one),
    _function("moe_router_topk_scaling_factor", canonical=_at_least_one),
    _function("moe_router_score_function", "softmax"),
    _function("moe_router_pre_softmax", False),
    _function("moe_apply_probs_on_input", False),
    _function("moe_expert_capacity_factor"),
    _function("moe_pad_expert_input_to_capacity", False),
)
BY_DEST = {field.dest: field for field in FIELDS}

# Without YaRN there is nothing that these change, but for the factor, which MLA's softmax scale follows in any case.
OF_YARN = (
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
)
_ONLY_UNDER_YARN = OF_YARN[1:]


@dataclass(frozen=True)
class Difference:
    """An argument whose values differ.

    Attributes:
        dest, option: Megatron's name of it, and as it is typed.
        recorded, now: of the checkpoint and of this run, as shown to people.
        shapes: it cannot be changed.
    """

    dest: str
    option: str
    recorded: str
    now: str
    shapes: bool

    def __str__(self) -> str:
        return f"{self.option} {self.recorded} (this run: {self.now})"


def changeable() -> list[str]:
    """Arguments of the model that `--checkpoint-changes` may name."""
    return [field.dest for field in FIELDS if not field.shapes]


def differences(recorded: Namespace, args: Namespace) -> list[Difference]:
    """Arguments of the model that a checkpoint was trained with and this run has otherwise, in the table's order.

    A converted checkpoint records what a release may have otherwise than others, and is compared by that.
    """
    rope = BY_DEST["rope_type"]
    kinds = {rope.value(recorded), rope.value(args)}
    converted = not hasattr(recorded, "train_iters")
    found = []
    for field in FIELDS:
        if converted and not hasattr(recorded, field.dest):
            continue
        if field.dest in OF_YARN and len(kinds) == 2:
            continue  # they belong to the rope type, which differs
        if field.dest in _ONLY_UNDER_YARN and kinds == {"rope"}:
            continue
        before, now = field.value(recorded), field.value(args)
        if not _same(before, now):
            found.append(Difference(field.dest, field.flag, _shown(before), _shown(now), field.shapes))
    return found


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return f"[{_runs(value)}]"
    return "none" if value is None else str(value)


def _runs(values: Iterable[Any]) -> str:
    """`0×3, 1×58`."""
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return ", ".join(str(value) if count == 1 else f"{value}×{count}" for value, count in runs)
