"""`build_pretraining_data_loader`: a data loader draws its seed from a generator of its own.

Each start of a DataLoader draws a number from PyTorch's default generator. A resumed run starts its loaders once more,
so its generator's state would not be that of the run that went on. (The order of samples is Megatron's samplers', and
does not depend on that number.)
"""

import functools
from typing import Any

import torch
from torch.utils.data import DataLoader

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> Any:
        loader = original(dataset, consumed_samples)
        if isinstance(loader, DataLoader) and loader.generator is None:
            loader.generator = torch.Generator()
        return loader

    return build_pretraining_data_loader


PATCH = Patch(
    name="build_pretraining_data_loader",
    target="megatron.training.datasets.data_samplers:build_pretraining_data_loader",
    signature="(dataset, consumed_samples)",
    why="a data loader leaves PyTorch's generator alone: a resumed run has the same random states",
    install=_install,
    also=("megatron.training.training:build_pretraining_data_loader",),
)
