"""Global names of parameters: the same for every layout, schedule and backend.

A global name is the reference backend's module path with layer and expert numbers counted over the whole
model, e.g. `decoder.layers.3.mlp.experts.17.linear_fc1.weight` or
`mtp.layers.0.mtp_model_layer.self_attention.linear_proj.weight`. Initial weights, checkpoint conversion and
comparisons between layouts are keyed by it.
"""

import re
from dataclasses import dataclass

import torch
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from dsv3_megatron.specs.deployment import deployment_of

__all__ = ["GlobalName", "Shard", "global_names", "named_weights", "unwrap"]


@dataclass(frozen=True)
class Shard:
    """Which part of the full tensor a tensor-parallel rank holds.

    The full tensor is cut into `blocks` equal pieces along `dim` (2 for the fused gate and up projections,
    which are split separately; 1 otherwise), each piece into `count` parts; this rank holds part `index` of
    every piece. `dim` is None where the tensor is not split.
    """

    dim: int | None = None
    index: int = 0
    count: int = 1
    blocks: int = 1

    def full_shape(self, local: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the full tensor, from the local one."""
        if self.dim is None:
            return tuple(local)
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(local))

    def take(self, full: Tensor) -> Tensor:
        """This rank's part of the full tensor."""
        if self.dim is None or self.count == 1:
            return full
        pieces = full.chunk(self.blocks, self.dim)
        return torch.cat([piece.chunk(self.count, self.dim)[self.index] for piece in pieces], self.dim)

    @staticmethod
    def join(parts: list[Tensor], shard: "Shard") -> Tensor:
        """The full tensor from the parts of all ranks in order; `shard` is any of the ranks' shards."""
        if shard.dim is None or shard.count == 1:
            return parts[0]
        by_rank = [part.chunk(shard.blocks, shard.dim) for part in parts]
        return torch.cat([pieces[block] for block in range(shard.blocks) for pieces in by_rank], shard.dim)


@dataclass(frozen=True)
class GlobalName:
    """A parameter's name in the whole model, and this rank's shard of it."""

    name: str
    shard: Shard


# Tensor-parallel split of a weight by the name of its module: (dim, blocks). All others are whole on every
# rank.
_SPLITS = {
    "word_embeddings": (0, 1),
    "output_layer": (0, 1),
    "linear_q_proj": (0, 1),
    "linear_q_up_proj": (0, 1),
    "linear_kv_up_proj": (0, 1),
    "linear_proj": (1, 1),
    "linear_fc1": (0, 2),
    "linear_fc2": (1, 1),
    "eh_proj": (0, 1),
}
# Transformer Engine keeps these norms inside the linear layer after them.
_FUSED_NORMS = {
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"^(decoder|mtp)\.layers\.(\d+)\.")
_SEQUENTIAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")  # SequentialMLP
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")  # TEGroupedMLP


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside DDP and Float16Module."""
    while hasattr(model, "module"):
        model = model.module
    return model


def named_weights(model_chunk: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and the routers' expert_bias of an (unwrapped or wrapped) model chunk, by local name."""
    model = unwrap(model_chunk)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    weights.update(
        (name, buffer) for name, buffer in model.named_buffers() if name.endswith("router.expert_bias")
    )
    return weights


def global_names(model_chunk: torch.nn.Module) -> dict[str, GlobalName]:
    """Local name → global name and shard, for everything in `named_weights(model_chunk)`.

    Args:
        model_chunk: a GPTModel built from `dsv3`, of any pipeline stage, either backend, wrapped or not.

    Where embedding or head stand on several ranks (MTP), they have the same global name on all of them.
    """
    model = unwrap(model_chunk)
    return {local: _global_name(model, local) for local in named_weights(model)}


def _global_name(model: torch.nn.Module, local: str) -> GlobalName:
    name = local
    match = _LAYER.match(local)
    if match:
        layers = getattr(model, match[1]).layers
        name = f"{match[1]}.layers.{layers[int(match[2])].layer_number - 1}.{local[match.end() :]}"
    for fused, separate in _FUSED_NORMS.items():
        if name.endswith(fused):
            name = name.removesuffix(fused) + separate
    name = _GROUPED_EXPERT.sub(r".experts.local_experts.\2.\1.weight", name)
    is_expert = _SEQUENTIAL_EXPERT.search(name)
    if is_expert:
        moe = model.get_submodule(local[: local.index(".experts.")])
        expert = moe.local_expert_indices[int(is_expert[1])]
        # Where the shared expert is routed (specs/deployment.py) it comes after all others.
        place = f".experts.{expert}." if expert < model.config.num_moe_experts else ".shared_experts."
        name = _SEQUENTIAL_EXPERT.sub(place, name)
    whole = is_expert or (".mlp." in name and deployment_of(model.config).whole_mlps)
    group = model.pg_collection.expt_tp if whole else model.pg_collection.tp
    return GlobalName(name, _shard(name, get_pg_rank(group), get_pg_size(group)))


def _shard(name: str, rank: int, size: int) -> Shard:
    *_, module, kind = name.split(".")
    if kind == "weight" and size > 1 and module in _SPLITS:
        dim, blocks = _SPLITS[module]
        return Shard(dim, rank, size, blocks)
    return Shard()
