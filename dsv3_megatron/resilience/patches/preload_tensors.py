"""`FileSystemWriterAsync.preload_tensors`: what is saved in the background is a copy, wherever the tensor was.

Before training goes on, tensors are taken to the CPU by `tensor.to("cpu")`, which copies from a GPU and returns a tensor
that is on the CPU already (an average of the weights, an offloaded optimizer, every tensor of a CPU run) as it is. The
worker would then write values of later steps.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    preload = original.__func__

    @functools.wraps(preload)
    def preload_tensors(write_buckets: list, non_blocking: bool = True) -> list:
        shared = {id(item): tensor for *_, (_, tensors) in write_buckets for item, tensor in tensors}
        return [
            (path, key, (bytes_, [(item, _copy(tensor, shared[id(item)])) for item, tensor in tensors]))
            for path, key, (bytes_, tensors) in preload(write_buckets, non_blocking)
        ]

    return staticmethod(preload_tensors)


def _copy(loaded: Any, tensor: Any) -> Any:
    return loaded.clone() if loaded.data_ptr() == tensor.data_ptr() else loaded


PATCH = Patch(
    name="preload_tensors",
    target="megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors",
    signature="(write_buckets, non_blocking=True)",
    why="a background save of tensors that are on the CPU would write the values of later steps",
    install=_install,
)
