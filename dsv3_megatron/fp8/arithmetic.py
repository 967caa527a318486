"""Whose arithmetic computes on a device: a function of what is there, and never of a version's number.

    quantisers, SwiGLU, messages     the Triton kernels of `fp8/kernels`, else plain PyTorch
    products                         `torch.nn.functional.scaled_mm` (cuBLASLt), else Triton's, else plain PyTorch

The kernels need a GPU that converts to E4M3 (sm_89). cuBLASLt scales by 1×128 and 128×128 on Hopper alone, from version
12.9 on, and torch's function for it came with these layouts. Plain PyTorch computes in fp32, on any device.
"""

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Features", "arithmetic_for", "choose_product", "features_of"]

KERNELS, REFERENCE = "dsv3_megatron.fp8.kernels", "dsv3_megatron.fp8"


@dataclass(frozen=True)
class Features:
    """What there is to compute with.

    Attributes:
        capability: of the CUDA device, e.g. (9, 0); None where there is none.
        triton: Triton is installed.
        scaled_mm: `torch.nn.functional.scaled_mm` takes scales by 1×128 and 128×128.
        cuda: CUDA version that torch was built with, e.g. (12, 9); its cublasLt has the same.
    """

    capability: tuple[int, int] | None = None
    triton: bool = False
    scaled_mm: bool = False
    cuda: tuple[int, int] = (0, 0)

    @property
    def kernels(self) -> bool:
        """Whether the Triton kernels run."""
        return self.triton and self.capability is not None and self.capability >= (8, 9)

    @property
    def block_scaled_mm(self) -> bool:
        """Whether cuBLASLt multiplies with block scales."""
        hopper = self.capability is not None and self.capability[0] == 9
        return hopper and self.scaled_mm and self.cuda >= (12, 9)


@functools.cache
def features_of(device: torch.device) -> Features:
    """The features of a tensor's device."""
    if device.type != "cuda":
        return Features()
    scaling = getattr(torch.nn.functional, "ScalingType", None)
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return Features(
        capability=torch.cuda.get_device_capability(device),
        triton=importlib.util.find_spec("triton") is not None,
        scaled_mm=hasattr(torch.nn.functional, "scaled_mm")
        and hasattr(scaling, "BlockWise1x128")
        and hasattr(scaling, "BlockWise128x128"),
        cuda=(int(major), int(minor)),
    )


def arithmetic_for(x: Tensor, features: Features | None = None) -> ModuleType:
    """The module whose `quantize_tile`, `pack_e5m6`, … are for x: the kernels, or the reference that they follow."""
    features = features_of(x.device) if features is None else features
    return importlib.import_module(KERNELS if features.kernels else REFERENCE)


def choose_product(
    features: Features, a_is_blocked: bool, b_is_blocked: bool
) -> Literal["scaled_mm", "kernel", "emulation"]:
    """Who multiplies; an operand is blocked where it has a scale per 128×128, not per 1×128.

    cuBLASLt has no product of two blocked matrices, which only the study's departures from the report ask for.
    """
    if features.block_scaled_mm and not (a_is_blocked and b_is_blocked):
        return "scaled_mm"
    return "kernel" if features.kernels else "emulation"
