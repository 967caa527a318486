"""`DistributedOptimizer.state_dict` with `torch.optim.AdamW` before its first step.

Where neither Transformer Engine nor Apex is, Megatron's Adam is PyTorch's, whose `step` is part of each parameter's
state. Megatron asserts that all of them agree on one: a new optimizer, which is what a checkpoint is loaded into, and a
rank without a shard have none (`assert len(steps) == 1`).
"""

import functools
from typing import Any

import torch

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def state_dict(self: Any) -> dict:
        if not isinstance(self.optimizer, torch.optim.Adam) or self.optimizer.state:
            return original(self)
        self.optimizer.state["placeholder"] = {"step": torch.tensor(0.0)}
        try:
            return original(self)
        finally:
            del self.optimizer.state["placeholder"]

    return state_dict


PATCH = Patch(
    name="optimizer_state_before_first_step",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
    signature="(self)",
    why="with PyTorch's AdamW a checkpoint does not load: a new optimizer has no step to agree on",
    install=_install,
)
