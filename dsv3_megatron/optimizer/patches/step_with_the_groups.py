"""`DistributedOptimizer._set_main_param_and_optimizer_states` with `torch.optim.AdamW`: `step` is no tensor to load.

It has come with the parameter groups; Megatron looks for it among the tensors of the parameter, where it is missing or
that of the new optimizer.
"""

import functools
from typing import Any

import torch

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @torch.no_grad()  # shards of fp32 parameters are views of leaves, written in place
    @functools.wraps(original)
    def _set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict) -> None:
        if isinstance(self.optimizer, torch.optim.Adam):
            tensors = {**tensors, "step": None}
        original(self, model_param, tensors)

    return _set_main_param_and_optimizer_states


PATCH = Patch(
    name="step_with_the_groups",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
    signature="(self, model_param, tensors)",
    why="with PyTorch's AdamW a checkpoint does not load: `step` is looked for among the saved tensors",
    install=_install,
)
