"""`DistributedOptimizer.load_state_dict` with `torch.optim.AdamW`: each parameter gets a `step` of its own.

Megatron gives all of them the same tensor, and each parameter's update would advance it.
"""

import functools
from typing import Any

import torch

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict) -> None:
        original(self, state_dict)
        if isinstance(self.optimizer, torch.optim.Adam):
            for state in self.optimizer.state.values():
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].clone()

    return load_state_dict


PATCH = Patch(
    name="own_steps_after_load",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
    signature="(self, state_dict)",
    why="with PyTorch's AdamW a loaded `step` is one tensor that every parameter advances",
    install=_install,
)
