"""Makes the running trainer follow the schedules: two patches and a function before each step."""

from typing import Any

import torch

from dsv3_megatron.recipe.arguments import apply, schedules_of
from dsv3_megatron.recipe.schedules import Schedules

__all__ = ["install", "set_constants"]


def install() -> None:
    """Follow `--train-tokens` in this process; without the option nothing changes. Idempotent.

    Raises:
        dsv3_megatron.patching.PatchMismatch: this Megatron version differs from the patches' expectation.
    """
    from dsv3_megatron.patching import install as install_patches
    from dsv3_megatron.training import hooks

    hooks.after_validation(apply)
    install_patches(["get_optimizer_param_scheduler"])
    hooks.before_step(_before_step)


def _before_step(call: dict[str, Any]) -> None:
    from megatron.training import get_args

    args = get_args()
    schedules = schedules_of(args)
    if schedules is not None:
        set_constants(call["model"], schedules, args.consumed_train_samples)


def set_constants(model: list[torch.nn.Module], schedules: Schedules, samples: int) -> None:
    """Write γ and λ for the step that begins after `samples` into the configurations that Megatron reads them from."""
    configs = {
        id(c): c for chunk in model for m in chunk.modules() if (c := getattr(m, "config", None)) is not None
    }
    for config in configs.values():
        if hasattr(config, "moe_router_bias_update_rate"):
            config.moe_router_bias_update_rate = schedules.gamma_at(samples)
            config.mtp_loss_scaling_factor = schedules.mtp_weight_at(samples)
