"""The attention's output kept for the backward pass once, in E5M6, whoever's kernels run (report §3.3.3).

Two modules keep it: the attention, whose gradient needs it again, and the Linear behind it, for Wgrad. Megatron lets
Transformer Engine's Linear keep the very tensor that the attention keeps, in bf16. Here its memory is given up after
the forward pass, 12 bits per number stand for it, and it is filled again when the backward pass arrives: Megatron's way
with what it recomputes (`CheckpointWithoutOutput`), so neither module has to know.

The reference backend does not need it: its Linear keeps E5M6 by itself, and its attention keeps no output.
"""

from typing import Any

from torch import Tensor

from dsv3_megatron.fp8.arithmetic import arithmetic_for

__all__ = ["KeepsInputInE5M6", "keep_in_e5m6"]


class KeepsInputInE5M6:
    """Mixin of the Linear after attention, whose `forward` returns its output first."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if result[0].requires_grad:
            keep_in_e5m6(x, until=result[0])
        return result


def keep_in_e5m6(x: Tensor, until: Tensor) -> bool:
    """Free the memory of x [..., K], and fill it with x as E5M6 holds it when the gradient of `until` arrives.

    Everything that was saved of x for the backward pass, in whatever shape, lies in this memory.

    Returns:
        Whether it was done: not where x is part of something larger, which others may need.
    """
    storage, size = x.untyped_storage(), x.nbytes
    if storage.nbytes() != size or not x.is_contiguous():
        return False
    dtype, num_columns = x.dtype, x.size(-1)
    packed = [arithmetic_for(x).pack_e5m6(x.detach().view(-1, num_columns))]

    def restore(_: Tensor) -> None:
        if packed:  # a second backward pass finds it restored
            numbers = arithmetic_for(packed[0][0]).unpack_e5m6(*packed.pop(), num_columns, dtype=dtype)
            storage.resize_(size)
            storage.copy_(numbers.untyped_storage())  # not x.copy_(): autograd must not see a change

    storage.resize_(0)
    until.register_hook(restore)
    return True
