"""Whose arithmetic computes on a tensor's device."""

import importlib
from types import ModuleType

from torch import Tensor

__all__ = ["arithmetic_for"]


def arithmetic_for(x: Tensor) -> ModuleType:
    """The module whose `quantize_tile`, `pack_e5m6`, … are for x: the kernels on a GPU, their reference elsewhere."""
    return importlib.import_module("dsv3_megatron.fp8.kernels" if x.is_cuda else "dsv3_megatron.fp8")
