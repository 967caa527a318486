"""What must divide, checked before anything of Megatron is imported."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3_megatron.conf.errors import ConfigError
from dsv3_megatron.conf.serving import is_for_serving, serving_of


def size(cfg: DictConfig, kind: str) -> int:
    """Ranks of one kind of parallelism: tensor, context, pipeline or expert."""
    name = "context_parallel_size" if kind == "context" else f"{kind}_model_parallel_size"
    return positive(cfg, name, default=1)


def positive(cfg: DictConfig, name: str, default: int | None = None) -> int:
    """The value of a setting that must be a positive whole number; `cluster.nodes` is one of a section."""
    value: Any = OmegaConf.select(cfg, name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value}: a positive whole number is needed")
    return value


def model_parallel_size(cfg: DictConfig) -> int:
    """The fewest processes the layout can run on: its dense and its expert grid must both fit."""
    tp, cp, pp, ep = (size(cfg, kind) for kind in ("tensor", "context", "pipeline", "expert"))
    etp = positive(cfg, "expert_tensor_parallel_size", default=tp)
    return pp * math.lcm(tp * cp, ep * etp)


def world_size(cfg: DictConfig) -> int:
    """Processes of the run: nodes × gpus_per_node."""
    return positive(cfg, "cluster.nodes") * positive(cfg, "cluster.gpus_per_node")


def data_parallel_size(cfg: DictConfig) -> int:
    """Replicas of the dense parameters."""
    return world_size(cfg) // (size(cfg, "tensor") * size(cfg, "context") * size(cfg, "pipeline"))


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be laid out. Sizes of the groups, experts, heads, batch and sequence.

    Errors: ConfigError with both numbers and the option to change.
    """
    world, needed = world_size(cfg), model_parallel_size(cfg)
    tp, cp, ep = (size(cfg, kind) for kind in ("tensor", "context", "expert"))
    if world % needed:
        raise ConfigError(
            f"cluster={cfg.cluster.name} has {world} processes, which the layout's {needed}"
            f" ({parallelism(cfg)}) do not divide: choose another layout, or set cluster.nodes and"
            " cluster.gpus_per_node"
        )
    num_experts = positive(cfg, "num_experts")
    serves = is_for_serving(cfg)
    if serves:
        serving_of(cfg)  # slots take the place of experts, and there is no batch of a step
    elif num_experts % ep:
        raise ConfigError(f"expert_model_parallel_size={ep} does not divide num_experts={num_experts}")
    heads = positive(cfg, "num_attention_heads")
    if heads % tp:
        raise ConfigError(f"tensor_model_parallel_size={tp} does not divide num_attention_heads={heads}")
    if cp > 1 and positive(cfg, "seq_length") % (2 * cp):
        raise ConfigError(
            f"seq_length={cfg.seq_length} is not a multiple of 2 × context_parallel_size = {2 * cp} (each"
            " rank holds one piece from either end)"
        )
    if cfg.get("global_batch_size") is not None and not serves:
        batch, micro = positive(cfg, "global_batch_size"), positive(cfg, "micro_batch_size")
        dp = data_parallel_size(cfg)
        if batch % (micro * dp):
            raise ConfigError(
                f"global_batch_size={batch} is not a multiple of micro_batch_size={micro} × {dp} data-"
                f"parallel ranks: use a multiple of {micro * dp}"
            )


def parallelism(cfg: DictConfig) -> str:
    """`TP1, CP1, PP2, EP2`."""
    return ", ".join(
        f"{label}{size(cfg, kind)}"
        for label, kind in (("TP", "tensor"), ("CP", "context"), ("PP", "pipeline"), ("EP", "expert"))
    )
