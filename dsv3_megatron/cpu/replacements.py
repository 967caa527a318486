"""The table of everything the CPU runtime replaces, and its installation.

Each row says of which kind it is: "device" stands for what a GPU or NCCL would be, and exists only here; "repair" mends
Megatron itself and is a listed patch that every run installs on every device (`dsv3_megatron.patching.repairs`).

A target inside Megatron is replaced right after its module has been executed, so that modules that import it
by name get the stand-in. A target that does not exist is an error, not a skip.
"""

import importlib
import importlib.abc
import importlib.machinery
import multiprocessing.forkserver
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed
from torch.utils._device import _device_constructors

from dsv3_megatron import patching
from dsv3_megatron.cpu import devices, distributed, megatron, refusals, streams
from dsv3_megatron.patching import repairs


class ReplacementError(RuntimeError):
    """A symbol to be replaced is missing from the installed torch or Megatron."""


@dataclass(frozen=True)
class Replacement:
    """`make(original)` gives the stand-in of each symbol `owner.name`, `name` in `names`; a repair names its patch."""

    kind: Literal["device", "repair"]
    owner: str
    names: tuple[str, ...]
    make: Callable[[Any], Any] | None
    why: str
    patch: str = ""


def _is(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def _device(owner: str, names: tuple[str, ...], make: Callable[[Any], Any], why: str) -> Replacement:
    return Replacement("device", owner, names, make, why)


def _repair(name: str) -> Replacement:
    owner, symbol = repairs.targets()[name]
    return Replacement("repair", owner, (symbol,), None, patching.load(name).why, name)


# Functions such as torch.empty and torch.tensor, as torch itself lists them. torch caches the list, with the
# original functions, on this first call: `with torch.device("meta")` keeps recognising them.
FACTORIES = tuple(
    sorted(name for name, f in vars(torch).items() if callable(f) and f in _device_constructors())
)

NEW = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")

CPU = "a CUDA device means the CPU"
NOTHING_TO_DO = "there is one memory and no device to set, start or free"
LOGGED = "logged; no device memory is used"
ONE_GENERATOR = "the CPU generator serves as the CUDA one"
STREAMS = "work runs at once, in issue order; events keep wall time; see streams.py and record.py"

# fmt: off
DEVICES: tuple[Replacement, ...] = (
    # Devices
    _device("torch", FACTORIES + LIKE, devices.redirect_keyword, CPU),
    _device("torch", ("Generator",), devices.redirect_generator, CPU),
    _device("torch.Tensor", NEW, devices.redirect_keyword, CPU),
    _device("torch.Tensor", ("to",), devices.redirect_first, CPU),
    _device("torch.nn.Module", ("to",), devices.redirect_first, CPU),
    _device("torch.utils._device.DeviceContext", ("__init__",), devices.redirect_first, CPU),
    _device("torch.Tensor", ("cuda", "pin_memory"), devices.returns_self, NOTHING_TO_DO),
    _device("torch.nn.Module", ("cuda",), devices.returns_self, NOTHING_TO_DO),
    _device("torch.Tensor", ("record_stream",), devices.returns(None),
                "memory is not reused behind a stream's back"),
    _device("torch.Tensor", ("type",), devices.cuda_type_name,
                "optimizers compare it with 'torch.cuda.FloatTensor'"),
    _device("torch.cuda", ("is_available", "is_initialized"), devices.returns(True), "Megatron asserts it"),
    _device("torch.accelerator", ("is_available",), devices.returns(False),
                "torch asks here: no pinning threads in data loaders, no graph-capture checks in optimizers"),
    _device("torch.cuda", ("device_count",), devices.device_count,
                "with 0, Megatron skips groups and seeds silently"),
    _device("torch.cuda", ("current_device",), devices.returns(0), CPU),
    _device("torch.cuda", ("set_device", "_lazy_init", "init", "empty_cache", "ipc_collect",
                "reset_peak_memory_stats"), devices.returns(None), NOTHING_TO_DO),
    _device("torch.cuda", ("_lazy_call",), devices.run_now, NOTHING_TO_DO),
    _device("torch.cuda", ("device",), devices.device_context, NOTHING_TO_DO),
    _device("torch.cuda", ("get_device_properties",), devices.device_properties, "asked by validation"),
    _device("torch.cuda", ("get_device_capability",), devices.device_capability, "asked by validation"),
    _device("torch.cuda", ("get_device_name",), devices.returns("cpu"), "logged"),
    _device("torch.cuda", ("memory_stats",), devices.memory_stats, LOGGED),
    _device("torch.cuda", ("memory_allocated", "max_memory_allocated", "memory_reserved",
                "max_memory_reserved", "device_memory_used"), devices.returns(0), LOGGED),
    _device("torch.cuda", ("CUDAGraph", "MemPool", "ExternalStream"), devices.refused,
                "no counterpart: constructing one is an error"),
    # Random numbers
    _device("torch.cuda", ("default_generators",), devices.default_generators, ONE_GENERATOR),
    _device("torch.cuda", ("get_rng_state",), devices.get_rng_state, ONE_GENERATOR),
    _device("torch.cuda", ("set_rng_state",), devices.set_rng_state, ONE_GENERATOR),
    _device("torch.cuda.random", ("get_rng_state",), devices.get_rng_state, ONE_GENERATOR),
    _device("torch.cuda.random", ("set_rng_state",), devices.set_rng_state, ONE_GENERATOR),
    _device("torch.cuda", ("manual_seed", "manual_seed_all"), devices.manual_seed, ONE_GENERATOR),
    # Streams
    _device("torch.cuda", ("Stream",), _is(streams.Stream), STREAMS),
    _device("torch.cuda", ("Event",), _is(streams.Event), STREAMS),
    _device("torch.cuda", ("stream", "StreamContext"), _is(streams.stream), STREAMS),
    _device("torch.cuda", ("current_stream",), _is(streams.current_stream), STREAMS),
    _device("torch.cuda", ("default_stream",), _is(streams.default_stream), STREAMS),
    _device("torch.cuda", ("set_stream",), _is(streams.set_stream), STREAMS),
    _device("torch.cuda", ("synchronize",), _is(streams.synchronize), STREAMS),
    _device("torch.cuda", ("is_current_stream_capturing",), devices.returns(False), "nothing is captured"),
    _device("torch.cuda.nvtx", ("range_push", "range_pop", "mark"), devices.returns(0), "no profiler"),
    # Process groups
    _device("torch.distributed", ("init_process_group",), distributed.init_process_group,
                "nccl becomes gloo; no device or NCCL options. Collectives stay as asynchronous as asked"),
    _device("torch.distributed", ("new_group",), distributed.new_group, "nccl becomes gloo; no NCCL options"),
    _device("torch.distributed", ("all_gather",), distributed.all_gather,
                "gloo gathers equal parts only; experts cut over tensor-parallel ranks have uneven ones"),
    _device("torch.distributed", ("reduce_scatter",), distributed.reduce_scatter, "the same on the way back"),
    _device("torch.distributed.distributed_c10d", ("ProcessGroupGloo",), distributed.one_gloo_device,
                "each group would have a polling thread of its own, and Megatron makes dozens of groups"),
    # Megatron
    _device("megatron.training.arguments", ("parse_and_validate_args",), refusals.checked_parsing,
                "refuses, by name, what cannot work on CPU"),
    _device("megatron.training.initialize", ("_warmup_jit_function",), devices.returns(None),
                "nothing is compiled; its random inputs would change the weights that are drawn later"),
    _device("megatron.core.tensor_parallel.random", ("CudaRNGStatesTracker",), megatron.quiet_rng_tracker,
                "warns that the CPU generator moved, which here is the CUDA one"),
    _device("megatron.core.transformer.moe.moe_utils", ("maybe_move_tensor_to_cpu",),
                megatron.maybe_move_tensor_to_cpu,
                "makes lists of the alltoall dispatcher's split sizes only when they are on a GPU"),
    _device("megatron.core.inference.communication_utils", ("_is_cuda", "_is_cuda_contiguous"),
                devices.returns(None), "asserts that tensors between pipeline stages are on a GPU"),
    _device("megatron.core.dist_checkpointing.strategies.filesystem_async", ("get_write_results_queue",),
                megatron.results_queue,
                "a process of its own, clear of CUDA's memory, takes seconds to start at each rank's first save"),
)
# fmt: on

TABLE: tuple[Replacement, ...] = (*DEVICES, *map(_repair, repairs.REPAIRS))


originals: dict[str, Any] = {}  # what has been replaced so far, by dotted name


def _resolve(path: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _apply(replacement: Replacement, owner: Any) -> None:
    if replacement.make is None:
        patching.install([replacement.patch])
        return
    for name in replacement.names:
        if not hasattr(owner, name):
            raise ReplacementError(
                f"dsv3_megatron.cpu replaces {replacement.owner}.{name}, which the installed version does not have "
                f"(torch {torch.__version__}). Supported: megatron-core 0.19."
            )
        original = originals[f"{replacement.owner}.{name}"] = getattr(owner, name)
        setattr(owner, name, replacement.make(original))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Applies the replacements of a Megatron module right after the module has been executed."""

    def __init__(self, pending: dict[str, list[Replacement]]) -> None:
        self.pending = pending

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname not in self.pending:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            for replacement in self.pending.pop(fullname, []):
                _apply(replacement, module)

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


# What a process that only pretends to have a GPU does as one that has: arguments are a GPU's, kernels are warmed up.
_ON_CPU_ONLY = ("megatron.training.arguments", "megatron.training.initialize")


def install(allow_te: bool = False, pretend: bool = False) -> None:
    """See `cpu.activate` and `cpu.pretend_gpu`."""
    if not allow_te:
        # `import transformer_engine` then raises ModuleNotFoundError, installed or not.
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    # Megatron's persistent checkpoint worker is a child of Python's fork server.
    multiprocessing.forkserver.set_forkserver_preload(["dsv3_megatron.cpu.child"])
    pending: dict[str, list[Replacement]] = {}
    for replacement in TABLE:
        if pretend and replacement.owner in _ON_CPU_ONLY:
            continue
        if replacement.owner.startswith("megatron."):
            pending.setdefault(replacement.owner, []).append(replacement)
        else:
            _apply(replacement, _resolve(replacement.owner))
    sys.meta_path.insert(0, _AfterImport(pending))
