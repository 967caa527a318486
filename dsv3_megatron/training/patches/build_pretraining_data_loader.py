"""`build_pretraining_data_loader`: a seed from a generator of its own, and a step's microbatches read ahead.

Each start of a DataLoader draws a number from PyTorch's default generator. A resumed run starts its loaders once more,
so its generator's state would not be that of the run that went on. (The order of samples is Megatron's samplers', and
does not depend on that number.)

Workers keep two batches each, by PyTorch's default; a step of ours takes all of its microbatches (60 at 2048 GPUs) before
it computes. They keep a step's worth, so that the next step's are read while this one computes.
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
        if isinstance(loader, DataLoader) and loader.num_workers:
            loader.prefetch_factor = max(2, -(-_microbatches() // loader.num_workers))
        return loader

    return build_pretraining_data_loader


def _microbatches() -> int:
    """That a data-parallel rank takes in a step, at the batch's final size."""
    from megatron.core import mpu
    from megatron.training import get_args

    args = get_args()
    return (args.global_batch_size or 1) // (args.micro_batch_size * mpu.get_data_parallel_world_size())


PATCH = Patch(
    name="build_pretraining_data_loader",
    target="megatron.training.datasets.data_samplers:build_pretraining_data_loader",
    signature="(dataset, consumed_samples)",
    why="a data loader leaves PyTorch's generator alone: a resumed run has the same random states; workers read a whole "
    "step ahead",
    install=_install,
    also=("megatron.training.training:build_pretraining_data_loader",),
)
