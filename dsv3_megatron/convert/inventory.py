"""Every tensor of a model by its three names: ours, the release's, and Megatron's checkpoint's. No files here.

A global name (`dsv3_megatron.specs.names`) stands for one tensor. The release keeps gate and up projection
apart; Megatron's checkpoint stacks the routed experts of a layer in one tensor [E, ...], and keeps some norms under
the name of the linear layer that follows, as Transformer Engine fuses them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.hf_names import to_hf

__all__ = ["Slot", "Weight", "duplicates", "extra_states", "is_quantized", "weights"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies inside a tensor of a Megatron checkpoint.

    Attributes:
        key: the checkpoint's name.
        global_shape: of the whole tensor there.
        offset: of our tensor in it, one number per dimension.
        shape: of our tensor as it lies there; stacked ones have a leading 1.
    """

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape


@dataclass(frozen=True)
class Weight:
    """One tensor of the release.

    Attributes:
        name: released name.
        shape: as released.
        slot: its place in a Megatron checkpoint.
        keeps_fp32: the routers' bias, whatever the dtype of the rest.
    """

    name: str
    shape: Shape
    slot: Slot
    keeps_fp32: bool = False


def weights(arch: Architecture) -> Iterator[Weight]:
    """All tensors of the release, layer by layer, without the copies that MTP layers carry."""
    for global_name, shape in _parameters(arch):
        parts = to_hf(global_name, arch.num_layers)
        rows = shape[0] // len(parts)
        for number, name in enumerate(parts):
            slot = _slot(arch, global_name, shape, number * rows, rows)
            yield Weight(name, (rows, *shape[1:]), slot, global_name.endswith("expert_bias"))


def duplicates(arch: Architecture) -> dict[str, str]:
    """Released name of each copy in an MTP layer → name of the original."""
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    layers = range(arch.num_layers, arch.num_layers + arch.mtp_num_layers)
    return {f"model.layers.{layer}.{copy}": original for layer in layers for copy, original in copies.items()}


def is_quantized(name: str) -> bool:
    """Whether the release stores this tensor in FP8: all projections but MTP's `eh_proj`, report §3.3."""
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return "_proj" in module and module != "eh_proj"


def _parameters(arch: Architecture) -> Iterator[tuple[str, Shape]]:
    """Global name and shape of every parameter and routers' bias."""
    hidden = arch.hidden_size
    yield "embedding.word_embeddings.weight", (arch.vocab_size, hidden)
    for layer in range(arch.num_layers):
        yield from _layer(arch, f"decoder.layers.{layer}.", arch.is_moe(layer))
    yield "decoder.final_layernorm.weight", (hidden,)
    yield "output_layer.weight", (arch.vocab_size, hidden)
    for depth in range(arch.mtp_num_layers):
        prefix = f"mtp.layers.{depth}."
        for norm in ("enorm", "hnorm", "final_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
        yield from _layer(arch, f"{prefix}mtp_model_layer.", arch.is_moe(arch.num_layers + depth))


def _layer(arch: Architecture, prefix: str, is_moe: bool) -> Iterator[tuple[str, Shape]]:
    hidden = arch.hidden_size
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        yield f"{prefix}{norm}.weight", (hidden,)
    for name, shape in _attention(arch):
        yield f"{prefix}self_attention.{name}.weight", shape
    if not is_moe:
        yield from _swiglu(f"{prefix}mlp.", hidden, arch.ffn_hidden_size)
        return
    yield f"{prefix}mlp.router.weight", (arch.num_experts, hidden)
    if arch.has_expert_bias:
        yield f"{prefix}mlp.router.expert_bias", (arch.num_experts,)
    shared = arch.num_shared_experts * arch.moe_ffn_hidden_size
    yield from _swiglu(f"{prefix}mlp.shared_experts.", hidden, shared)
    for expert in range(arch.num_experts):
        yield from _swiglu(f"{prefix}mlp.experts.{expert}.", hidden, arch.moe_ffn_hidden_size)


def _attention(arch: Architecture) -> Iterator[tuple[str, Shape]]:
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    queries = heads * (arch.qk_head_dim + arch.qk_pos_emb_head_dim)
    if arch.q_lora_rank is None:
        yield "linear_q_proj", (queries, hidden)
    else:
        yield "linear_q_down_proj", (arch.q_lora_rank, hidden)
        yield "q_layernorm", (arch.q_lora_rank,)
        yield "linear_q_up_proj", (queries, arch.q_lora_rank)
    yield "linear_kv_down_proj", (arch.kv_lora_rank + arch.qk_pos_emb_head_dim, hidden)
    yield "kv_layernorm", (arch.kv_lora_rank,)
    yield "linear_kv_up_proj", (heads * (arch.qk_head_dim + arch.v_head_dim), arch.kv_lora_rank)
    yield "linear_proj", (hidden, heads * arch.v_head_dim)


def _swiglu(prefix: str, hidden: int, ffn: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}linear_fc1.weight", (2 * ffn, hidden)
    yield f"{prefix}linear_fc2.weight", (hidden, ffn)


_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FUSED_NORMS = {
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
_NORM_OF_DENSE = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def _slot(arch: Architecture, global_name: str, shape: Shape, row: int, rows: int) -> Slot:
    """Where rows `row` to `row + rows` of a global tensor lie in a Megatron checkpoint."""
    key = global_name.replace(".mtp_model_layer.", ".transformer_layer.")
    for ours, fused in _FUSED_NORMS.items():
        key = key.replace(ours, fused)
    if key.endswith(_NORM_OF_DENSE[0]) and not arch.is_moe(_layer_number(arch, key)):
        key = key.replace(*_NORM_OF_DENSE)
    offset, part = (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
    expert = _EXPERT.search(key)
    if expert is None:
        return Slot(key, shape, offset, part)
    key = _EXPERT.sub(".experts.experts.", key)
    return Slot(key, (arch.num_experts, *shape), (int(expert[1]), *offset), (1, *part))


def _layer_number(arch: Architecture, key: str) -> int:
    block, _, number, *_ = key.split(".")
    return int(number) + (arch.num_layers if block == "mtp" else 0)


# Modules of a layer that may have an `_extra_state` (Transformer Engine's, or Megatron's placeholder for one).
_MODULES_OF_ATTENTION = (
    "core_attention",
    "linear_proj",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
    "q_layernorm",
    "kv_layernorm",
)


def extra_states(arch: Architecture) -> Iterator[str]:
    """Unique names of the empty `_extra_state` objects that Megatron asks a checkpoint for, either backend.

    The names of all modules that may have one: what a backend does not have it does not ask for.
    """
    yield "output_layer._extra_state/shard_0_1"
    layers = [(f"decoder.layers.{layer}.", layer) for layer in range(arch.num_layers)]
    for depth in range(arch.mtp_num_layers):
        yield f"mtp.layers.{depth}.eh_proj._extra_state/shard_0_1"
        layers.append((f"mtp.layers.{depth}.transformer_layer.", arch.num_layers + depth))
    for prefix, layer in layers:
        for module in _MODULES_OF_ATTENTION:
            yield f"{prefix}self_attention.{module}._extra_state/shard_0_1"
        is_moe = arch.is_moe(layer)
        for linear in ("linear_fc1", "linear_fc2"):
            yield f"{prefix}mlp.{'shared_experts.' if is_moe else ''}{linear}._extra_state/shard_0_1"
            for expert in range(arch.num_experts if is_moe else 0):
                experts = f"{prefix}mlp.experts.experts.{linear}._extra_state"
                yield f"{experts}/shard_{expert}_{arch.num_experts}"
