"""The sizes of a DeepSeek-V3 model: from and to Hugging Face's config.json and Megatron's arguments."""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.convert.errors import ConversionError

__all__ = ["Architecture", "Yarn"]

# Keys of config.json that are another model when they have another value.
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}


@dataclass(frozen=True)
class Yarn:
    """Long-context rope (report §4.3); fields as in config.json."""

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """Everything that shapes the model; named as Megatron's arguments where it has the same thing.

    Attributes:
        num_dense_layers: leading layers without experts; `num_layers` for a model without any.
        num_shared_experts: shared experts, each of `moe_ffn_hidden_size`.
        q_lora_rank: None for queries without compression.
        mtp_num_layers: MTP layers whose weights exist.
        yarn: None for plain rope.
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
    rotary_base: float
    layernorm_epsilon: float
    yarn: Yarn | None

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
            ConversionError: a key is missing, or describes a model that is not DeepSeek-V3.
        """
        for key, wanted in _FIXED.items():
            if config.get(key, wanted) != wanted:
                raise ConversionError(f"config.json: {key}={config[key]!r} is not DeepSeek-V3 ({wanted!r})")
        heads = config.get("num_attention_heads")
        if config.get("num_key_value_heads", heads) not in (heads, None):
            raise ConversionError(
                f"config.json: num_key_value_heads={config['num_key_value_heads']} must equal "
                f"num_attention_heads={heads}: MLA has no groups"
            )
        try:
            num_layers = config["num_hidden_layers"]
            return cls(
                num_layers=num_layers,
                num_dense_layers=min(config["first_k_dense_replace"], num_layers),
                hidden_size=config["hidden_size"],
                ffn_hidden_size=config["intermediate_size"],
                num_attention_heads=config["num_attention_heads"],
                q_lora_rank=config["q_lora_rank"],
                kv_lora_rank=config["kv_lora_rank"],
                qk_head_dim=config["qk_nope_head_dim"],
                qk_pos_emb_head_dim=config["qk_rope_head_dim"],
                v_head_dim=config["v_head_dim"],
                num_experts=config["n_routed_experts"],
                moe_ffn_hidden_size=config["moe_intermediate_size"],
                num_shared_experts=config["n_shared_experts"],
                moe_router_topk=config["num_experts_per_tok"],
                moe_router_num_groups=config["n_group"],
                moe_router_group_topk=config["topk_group"],
                moe_router_topk_scaling_factor=float(config["routed_scaling_factor"]),
                mtp_num_layers=mtp_num_layers,
                vocab_size=config["vocab_size"],
                max_position_embeddings=config["max_position_embeddings"],
                rotary_base=_rope_theta(config),
                layernorm_epsilon=config["rms_norm_eps"],
                yarn=_yarn(config),
            )
        except KeyError as error:
            raise ConversionError(f"config.json: {error.args[0]} is missing") from error

    def to_hf(self) -> dict[str, Any]:
        """The keys of config.json that describe the model, as the release has them."""
        yarn = self.yarn
        scaling = None if yarn is None else {"type": "yarn", **vars(yarn)}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            **_FIXED,
            "num_hidden_layers": self.num_layers,
            "first_k_dense_replace": self.num_dense_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_head_dim,
            "qk_rope_head_dim": self.qk_pos_emb_head_dim,
            "v_head_dim": self.v_head_dim,
            "n_routed_experts": self.num_experts,
            "moe_intermediate_size": self.moe_ffn_hidden_size,
            "n_shared_experts": self.num_shared_experts,
            "num_experts_per_tok": self.moe_router_topk,
            "n_group": self.moe_router_num_groups,
            "topk_group": self.moe_router_group_topk,
            "routed_scaling_factor": self.moe_router_topk_scaling_factor,
            "num_nextn_predict_layers": self.mtp_num_layers,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rotary_base,
            "rope_scaling": scaling,
            "rms_norm_eps": self.layernorm_epsilon,
            "attention_dropout": 0.0,
            "use_cache": True,
        }

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
            "rotary_base": int(self.rotary_base),
        }
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
        values = self.arguments()
        values["moe_layer_freq"] = [int(self.is_moe(layer)) for layer in range(self.num_layers)]
        values["q_lora_rank"] = self.q_lora_rank
        values["layernorm_epsilon"] = values.pop("norm_epsilon")
        values["mtp_num_layers"] = self.mtp_num_layers or None
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
            yarn = None
            if getattr(args, "rope_type", "rope") == "yarn":
                usual = Yarn(
                    args.rotary_scaling_factor, mscale=args.mscale, mscale_all_dim=args.mscale_all_dim
                )
                yarn = Yarn(**{name: getattr(args, name, value) for name, value in vars(usual).items()})
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
                yarn=yarn,
            )
        except AttributeError as error:
            raise ConversionError(f"the checkpoint's arguments lack {error.name}") from error


def _moe_pattern(args: Namespace) -> list[int]:
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return list(frequency)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` (as released) and `rope_parameters` (transformers 5), whichever there is."""
    both = [dict(config[key]) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    for rope in both:
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    if len(both) == 2:
        shared = both[0].keys() & both[1].keys()
        differ = sorted(key for key in shared if both[0][key] != both[1][key])
        if differ:
            raise ConversionError(f"config.json: rope_scaling and rope_parameters disagree on {differ}")
        return both[0] | both[1]
    return both[0] if both else {"rope_type": "default"}


def _rope_theta(config: Mapping[str, Any]) -> float:
    theta = _rope(config).get("rope_theta", config.get("rope_theta", 10000))
    return int(theta) if float(theta).is_integer() else float(theta)


def _yarn(config: Mapping[str, Any]) -> Yarn | None:
    rope = _rope(config)
    kind = rope["rope_type"]
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConversionError(f"config.json: rope type {kind!r} is not DeepSeek-V3's: yarn, or none")
    fields = [field.name for field in dataclasses.fields(Yarn)]
    missing = [name for name in fields if name not in rope]
    if missing:
        raise ConversionError(
            f"config.json: yarn without {missing}; what they default to differs between readers"
        )
    return Yarn(**{name: rope[name] for name in fields})
