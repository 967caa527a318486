"""The sizes of a model of DeepSeek-V3's family: from and to Megatron's arguments, and (`hf_config.py`) config.json."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_config import fields_from_hf, fields_to_hf
from dsv3_megatron.convert.rope import Yarn

__all__ = ["Architecture", "Yarn"]


# What Megatron's arguments say of every model of the family.
_OF_THE_FAMILY: dict[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "group_query_attention": False,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": False,
    # Without YaRN:
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclass(frozen=True)
class Architecture:
    """Everything that shapes the model; named as Megatron's arguments where it has the same thing.

    Attributes:
        num_dense_layers: leading layers without experts; `num_layers` for a model without any.
        num_shared_experts: shared experts, each of `moe_ffn_hidden_size`.
        q_lora_rank: None for queries without compression.
        mtp_num_layers: MTP layers whose weights exist.
        yarn: None for plain rope.
        moe_router_score_function: "sigmoid" (V3: bias for the choice, weights normalised), or "softmax" (V2: neither).
    """

    num_layers: int
    num_dense_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    num_experts: int
    moe_ffn_hidden_size: int
    num_shared_experts: int
    moe_router_topk: int
    moe_router_num_groups: int
    moe_router_group_topk: int
    moe_router_topk_scaling_factor: float
    mtp_num_layers: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: int
    layernorm_epsilon: float
    yarn: Yarn | None
    moe_router_score_function: str = "sigmoid"

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts; MTP layers (from `num_layers` on) are as the last one."""
        return min(layer, self.num_layers - 1) >= self.num_dense_layers

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], mtp_num_layers: int) -> "Architecture":
        """From config.json.

        Args:
            config: its contents.
            mtp_num_layers: MTP layers that have tensors; what config.json says of them is not read.

        Raises:
            ConversionError: a key is missing or unknown, or describes a model that is not of the family.
        """
        return cls(**fields_from_hf(config), mtp_num_layers=mtp_num_layers)

    def to_hf(self, model_type: str | None = None) -> dict[str, Any]:
        """The keys of config.json that describe the model, see `fields_to_hf`."""
        return fields_to_hf(vars(self), model_type)

    @property
    def has_expert_bias(self) -> bool:
        """Whether the routers have a bias for the choice of experts."""
        return self.moe_router_score_function == "sigmoid"

    def arguments(self) -> dict[str, Any]:
        """Arguments of `dsv3_megatron.train`, named as in Hydra (underscores for hyphens)."""
        arguments: dict[str, Any] = {
            "num_layers": self.num_layers,
            "moe_layer_freq": f"([0]*{self.num_dense_layers}+[1]*{self.num_layers - self.num_dense_layers})",
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "q_lora_rank": self.q_lora_rank or 0,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_head_dim": self.qk_head_dim,
            "qk_pos_emb_head_dim": self.qk_pos_emb_head_dim,
            "v_head_dim": self.v_head_dim,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_experts": self.num_experts,
            "moe_ffn_hidden_size": self.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": self.num_shared_experts * self.moe_ffn_hidden_size,
            "moe_router_topk": self.moe_router_topk,
            "moe_router_num_groups": self.moe_router_num_groups,
            "moe_router_group_topk": self.moe_router_group_topk,
            "moe_router_topk_scaling_factor": self.moe_router_topk_scaling_factor,
            "mtp_num_layers": self.mtp_num_layers,
            "vocab_size": self.vocab_size,
            "padded_vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "norm_epsilon": self.layernorm_epsilon,
            "rotary_base": self.rotary_base,
        }
        if not self.has_expert_bias:
            arguments |= {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}
        if self.yarn is not None:
            arguments |= {
                "rope_type": "yarn",
                "rotary_scaling_factor": self.yarn.factor,
                "mscale": self.yarn.mscale,
                "mscale_all_dim": self.yarn.mscale_all_dim,
            }
            usual = Yarn(self.yarn.factor)
            for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
                if getattr(self.yarn, name) != getattr(usual, name):
                    arguments[name] = getattr(self.yarn, name)
        return arguments

    def namespace(self) -> Namespace:
        """What Megatron's parsed arguments say of the model; `from_megatron` reads it again."""
        values = _OF_THE_FAMILY | self.arguments()
        values["moe_layer_freq"] = [int(self.is_moe(layer)) for layer in range(self.num_layers)]
        values["q_lora_rank"] = self.q_lora_rank
        values["layernorm_epsilon"] = values.pop("norm_epsilon")
        values["mtp_num_layers"] = self.mtp_num_layers or None
        values["moe_router_enable_expert_bias"] = self.has_expert_bias
        # Also what is as usual: a run that loads the weights is compared with it.
        values.setdefault("rope_type", "rope")
        if self.yarn is not None:
            values |= {name: value for name, value in vars(self.yarn).items() if name != "factor"}
        return Namespace(**values)

    @classmethod
    def from_megatron(cls, args: Namespace, vocab_size: int, mtp_num_layers: int) -> "Architecture":
        """From the arguments in a Megatron checkpoint.

        Args:
            args: as a trainer (or `namespace`) stored them.
            vocab_size, mtp_num_layers: of the weights in the checkpoint.

        Raises:
            ConversionError: the arguments lack a size, or describe layers that config.json cannot.
        """
        try:
            pattern = _moe_pattern(args)
            dense = pattern.index(1) if 1 in pattern else len(pattern)
            if pattern != [0] * dense + [1] * (len(pattern) - dense):
                raise ConversionError(
                    f"moe_layer_freq={pattern}: config.json can only say that the first layers are dense"
                )
            return cls(
                num_layers=args.num_layers,
                num_dense_layers=dense,
                hidden_size=args.hidden_size,
                ffn_hidden_size=args.ffn_hidden_size,
                num_attention_heads=args.num_attention_heads,
                q_lora_rank=args.q_lora_rank,
                kv_lora_rank=args.kv_lora_rank,
                qk_head_dim=args.qk_head_dim,
                qk_pos_emb_head_dim=args.qk_pos_emb_head_dim,
                v_head_dim=args.v_head_dim,
                num_experts=args.num_experts,
                moe_ffn_hidden_size=args.moe_ffn_hidden_size,
                num_shared_experts=args.moe_shared_expert_intermediate_size // args.moe_ffn_hidden_size,
                moe_router_topk=args.moe_router_topk,
                moe_router_num_groups=args.moe_router_num_groups or 1,
                moe_router_group_topk=args.moe_router_group_topk or 1,
                moe_router_topk_scaling_factor=args.moe_router_topk_scaling_factor or 1.0,
                mtp_num_layers=mtp_num_layers,
                vocab_size=vocab_size,
                max_position_embeddings=args.max_position_embeddings,
                rotary_base=args.rotary_base,
                layernorm_epsilon=args.layernorm_epsilon,
                yarn=_yarn(args),
                moe_router_score_function=_score_function(args),
            )
        except AttributeError as error:
            raise ConversionError(f"the checkpoint's arguments lack {error.name}") from error


def _moe_pattern(args: Namespace) -> list[int]:
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return list(frequency)


def _yarn(args: Namespace) -> Yarn | None:
    if getattr(args, "rope_type", "rope") == "yarn":
        usual = Yarn(args.rotary_scaling_factor, mscale=args.mscale, mscale_all_dim=args.mscale_all_dim)
        return Yarn(**{name: getattr(args, name, value) for name, value in vars(usual).items()})
    if getattr(args, "rotary_scaling_factor", 1.0) > 1 and getattr(args, "mscale_all_dim", 0.0):
        raise ConversionError(
            f"rotary_scaling_factor={args.rotary_scaling_factor} without rope_type=yarn: Megatron then multiplies the "
            "softmax scale and leaves the positions alone, for which config.json has no word"
        )
    return None


def _score_function(args: Namespace) -> str:
    found = getattr(args, "moe_router_score_function", "sigmoid")
    pre_softmax = bool(getattr(args, "moe_router_pre_softmax", False))
    if found not in ("sigmoid", "softmax") or (found == "softmax" and not pre_softmax):
        raise ConversionError(
            f"moe_router_score_function={found}, moe_router_pre_softmax={pre_softmax}: config.json has words for "
            "sigmoid, and for softmax before the choice of experts"
        )
    return found
