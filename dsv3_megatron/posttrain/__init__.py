"""Post-training: preference learning (DPO) and reinforcement learning (GRPO) in the trainer, under its layouts.

`dpo_loss` and `grpo_loss` are pure functions of log-probabilities. `--posttrain dpo|grpo` (`arguments`) puts them in
the place of the trainer's loss (`install`); docs/posttrain.md. Nothing is imported before it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_megatron.posttrain.policy_loss import group_advantages, grpo_loss
    from dsv3_megatron.posttrain.preference_loss import dpo_loss

__all__ = ["dpo_loss", "group_advantages", "grpo_loss"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsv3_megatron.posttrain import policy_loss, preference_loss

    return getattr(preference_loss if name == "dpo_loss" else policy_loss, name)
