"""`WrappedTorchNorm`: Megatron's own PyTorch norm under sequence parallelism.

It asserts that there is none, though the norm itself is right on a part of the sequence; only its parameters have to be
marked, so that Megatron sums their gradients over the tensor-parallel ranks.
"""

import copy
from typing import Any

import torch

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    build = original.__func__

    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = build(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return staticmethod(__new__)


PATCH = Patch(
    name="torch_norm",
    target="megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
    signature=(
        "(cls, config, hidden_size, eps=1e-05, persist_layer_norm=False, zero_centered_gamma=False, "
        "normalization='LayerNorm')"
    ),
    why="Megatron's PyTorch norm refuses sequence parallelism, for which it only has to mark its parameters",
    install=_install,
)
