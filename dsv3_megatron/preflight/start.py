"""The process in which a job is checked: it answers Megatron as one with the job's GPU and packages would."""

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

from dsv3_megatron.preflight.machine import GPUS, Machine


def become(machine: Machine) -> None:
    """Before anything imports Megatron. Later calls change the GPU, not whether Transformer Engine can be imported."""
    # What Megatron misses on this machine says nothing about the job's.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from dsv3_megatron import cpu

    gpu = GPUS[machine.gpu]
    cpu.pretend_gpu(gpu.capability, gpu.memory_gb, allow_te=machine.te_is_here())


@contextlib.contextmanager
def with_packages_of(machine: Machine) -> Iterator[None]:
    """While inside, Megatron believes in the job's version of Transformer Engine, though it may not be here."""
    if machine.te_is_here():
        yield
        return
    from packaging.version import Version

    utils: Any = importlib.import_module("megatron.core.utils")
    moe: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(utils, "_te_version", Version(machine.te_version() or "0.0.0")))
        if machine.has_te() and "permute_fusion" not in machine.te_lacks():
            # Megatron's validation looks for these; they are not called.
            for name in _PERMUTE:
                stack.enter_context(mock.patch.object(moe, name, _not_here))
        yield


_PERMUTE = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)


def _not_here(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("Transformer Engine is imagined in this process: none of its functions runs")
