"""The attention's output kept for the backward pass once, in E5M6, whoever's kernels run (report §3.3.3).

Two modules keep it: the attention, whose gradient needs it again, and the Linear behind it, for Wgrad. Transformer
Engine lets both keep the same bf16 tensor; here it is replaced by 12 bits per number. PyTorch's hooks on saved tensors
see what a module keeps, so this depends on no version of the kernels.

The reference backend does not need it: its Linear keeps E5M6 by itself, and its attention keeps no output.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dsv3_megatron.fp8 import e5m6
from dsv3_megatron.specs.mla import DSV3SelfAttention

__all__ = ["KeepsAttentionOutput", "KeepsInput", "SavedOnce"]


class Packed(NamedTuple):
    """[M, K] in E5M6: bytes [M, 3·⌈K/2⌉], scales [M, ⌈K/128⌉]."""

    packed: Tensor
    scale: Tensor
    num_columns: int

    @classmethod
    def of(cls, x: Tensor) -> "Packed":
        matrix = x.detach().reshape(-1, x.size(-1))
        packed, scale = _arithmetic(x).pack_e5m6(matrix)
        return cls(packed, scale, matrix.size(1))

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """[M, K] in dtype."""
        return _arithmetic(self.packed).unpack_e5m6(*self, dtype=dtype)


class _Slot:
    """What autograd holds in the place of a saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.packed: Packed | None = None
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def pack(self, packed: Packed) -> None:
        self.tensor, self.packed = None, packed

    def restore(self) -> Tensor:
        if self.packed is None:
            assert self.tensor is not None
            return self.tensor
        return self.packed.unpack(self.dtype).view(self.shape)


class SavedOnce:
    """What was saved for backward within `watching()`, until `pack` replaces one tensor among it.

    Everything is kept as it is until then, and for good where `pack` is not called.
    """

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    def watching(self) -> saved_tensors_hooks:
        """A context for the forward pass of the modules that may save the tensor."""
        return saved_tensors_hooks(self._save, _Slot.restore)

    def pack(self, x: Tensor) -> int:
        """Let all that was saved of x [..., K], in whatever shape, be one copy in E5M6; how many tensors that were."""
        same = [slot for slot in self._slots if slot.tensor is not None and _same(slot.tensor, x)]
        self._slots.clear()
        if same:
            packed = Packed.of(x)
            for slot in same:
                slot.pack(packed)
        return len(same)

    def _save(self, tensor: Tensor) -> _Slot:
        slot = _Slot(tensor)
        self._slots.append(slot)
        return slot


class KeepsInput:
    """Mixin of the Linear after attention: its input, and what the attention kept of it, is kept in E5M6."""

    attention: SavedOnce | None = None  # what the attention saved for this microbatch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        saved, self.attention = self.attention or SavedOnce(), None
        with saved.watching():
            result = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        saved.pack(x)
        return result


class KeepsAttentionOutput(DSV3SelfAttention):
    """MLA whose `linear_proj` is a `KeepsInput`."""

    def _run_core_attention(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.checkpoint_core_attention:  # keeps its inputs only, and runs once more in the backward pass
            return super()._run_core_attention(*args, **kwargs)
        saved = SavedOnce()
        with saved.watching():
            output = super()._run_core_attention(*args, **kwargs)
        self.linear_proj.attention = saved
        return output


def _same(a: Tensor, b: Tensor) -> bool:
    """The same numbers in the same memory, in whatever shape."""
    return (
        a.data_ptr() == b.data_ptr()
        and (a.dtype, a.numel()) == (b.dtype, b.numel())
        and a.is_contiguous()
        and b.is_contiguous()
    )


def _arithmetic(x: Tensor) -> ModuleType:
    """The module with E5M6 for x's device: our kernels on a GPU, PyTorch elsewhere."""
    if x.is_cuda:
        from dsv3_megatron.fp8.kernels import e5m6 as kernels

        return kernels
    return e5m6
