"""Post-training: preference learning (DPO) and reinforcement learning (GRPO) in the trainer, under its layouts.

`dpo_loss` and `grpo_loss` are pure functions of log-probabilities. `--posttrain dpo|grpo` (`arguments`) puts them in
the place of the trainer's loss (`install`); docs/posttrain.md.
"""

from dsv3_megatron.posttrain.policy_loss import group_advantages, grpo_loss
from dsv3_megatron.posttrain.preference_loss import dpo_loss

__all__ = ["dpo_loss", "group_advantages", "grpo_loss"]
