"""`DistributedOptimizer.sharded_param_state_fully_reshardable`: parameters after a padded bucket are found again.

Megatron gathers a buffer's state without the padding at the end of its buckets, and then cuts it at offsets that count
the padding: with two buckets or more (a shared embedding has its own, --overlap-grad-reduce makes many) and two
data-parallel ranks or more, what is saved under a parameter's name is shifted, and the end of the last one is zeros.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from dsv3_megatron.patching import Patch


@contextlib.contextmanager
def without_padding(buffer: Any) -> Iterator[None]:
    """Inside, the buffer's parameters have their offsets in its unpadded buckets, one after the other."""
    padded = buffer.param_index_map
    shift, offset = [], 0
    for bucket, (start, _) in zip(buffer.buckets, buffer.bucket_indices, strict=True):
        shift.append(start - offset)
        offset += bucket.numel_unpadded
    buffer.param_index_map = {
        param: (start - shift[bucket], end - shift[bucket], bucket)
        for param, (start, end, bucket) in padded.items()
    }
    try:
        yield
    finally:
        buffer.param_index_map = padded


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for buffer in self.buffers:
                stack.enter_context(without_padding(buffer))
            return original(self, *args, **kwargs)

    return sharded_param_state_fully_reshardable


PATCH = Patch(
    name="fully_reshardable_offsets",
    target=(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable"
    ),
    signature="(self, model_sharded_state_dict, is_loading=False, metadata=None)",
    why="optimizer checkpoints for any layout: parameters behind a padded bucket were saved shifted",
    install=_install,
)
