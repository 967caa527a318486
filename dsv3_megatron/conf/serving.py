"""The `serving` section of a layout: what is deployed beyond the parallel groups (report §3.4)."""

from typing import Any

from omegaconf import DictConfig

from dsv3_megatron.conf.errors import ConfigError
from dsv3_megatron.specs.deployment import Deployment

__all__ = ["ENTRIES", "PHASES", "is_for_serving", "serving_of"]

PHASES = ("prefill", "decode")
ENTRIES = (
    "phase",
    "redundant_experts",
    "shared_expert_as_routed",
    "mlp_tensor_parallel_size",
    "microbatches",
)


def is_for_serving(cfg: DictConfig) -> bool:
    """Whether the layout is one for serving, which nothing trains with.

    Raises:
        ConfigError: entries of the section are set, and the layout has none.
    """
    section = cfg.get("serving")
    if section is None:
        return False
    if section.get("phase") is None:
        entry = next(iter(section))
        raise ConfigError(
            f"serving.{entry}={section[entry]} would do nothing: the layout is for training; use "
            "layout=prefill_tp4_dp8_ep32 or layout=decode_tp4_dp80_ep320"
        )
    return True


def serving_of(cfg: DictConfig) -> Deployment:
    """Of a composed configuration; nothing special for a training layout.

    Raises:
        ConfigError: names the entry and its value.
    """
    if not is_for_serving(cfg):
        return Deployment()
    section = cfg.serving
    _one_of(section, "phase", PHASES)
    _one_of(section, "shared_expert_as_routed", (False, True))
    _one_of(section, "mlp_tensor_parallel_size", (1, None))
    _one_of(section, "microbatches", (1, 2))
    extra = section.get("redundant_experts")
    if not isinstance(extra, int) or isinstance(extra, bool) or extra < 0:
        raise ConfigError(f"serving.redundant_experts={extra}: a whole number is needed, 0 or more")
    deployment = Deployment(
        extra,
        bool(section.get("shared_expert_as_routed")),
        section.get("mlp_tensor_parallel_size") == 1,
        section.get("microbatches") or 1,
    )
    experts = cfg.get("num_experts") or 0
    shared = (cfg.get("moe_shared_expert_intermediate_size") or 0) // (cfg.get("moe_ffn_hidden_size") or 1)
    try:
        deployment.check(experts, shared, cfg.get("expert_model_parallel_size") or 1)
    except ValueError as error:
        raise ConfigError(f"serving.redundant_experts={extra}: {error}") from error
    return deployment


def _one_of(section: Any, entry: str, values: tuple[Any, ...]) -> None:
    value = section.get(entry)
    if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
        allowed = " or ".join(
            "null" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in values
        )
        raise ConfigError(f"serving.{entry}={value}: use {allowed}")
