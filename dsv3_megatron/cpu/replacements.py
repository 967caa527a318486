"""The table of everything the CPU runtime replaces, and its installation.

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
from typing import Any

import torch
import torch.distributed
from torch.utils._device import _device_constructors

from dsv3_megatron.cpu import devices, distributed, megatron, refusals, streams


class ReplacementError(RuntimeError):
    """A symbol to be replaced is missing from the installed torch or Megatron."""


@dataclass(frozen=True)
class Replacement:
    """`make(original)` gives the stand-in of each symbol `owner.name`, `name` in `names`."""

    owner: str
    names: tuple[str, ...]
    make: Callable[[Any], Any]
    why: str


def _is(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


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
TABLE: tuple[Replacement, ...] = (
    # Devices
    Replacement("torch", FACTORIES + LIKE, devices.redirect_keyword, CPU),
    Replacement("torch", ("Generator",), devices.redirect_generator, CPU),
    Replacement("torch.Tensor", NEW, devices.redirect_keyword, CPU),
    Replacement("torch.Tensor", ("to",), devices.redirect_first, CPU),
    Replacement("torch.nn.Module", ("to",), devices.redirect_first, CPU),
    Replacement("torch.utils._device.DeviceContext", ("__init__",), devices.redirect_first, CPU),
    Replacement("torch.Tensor", ("cuda", "pin_memory"), devices.returns_self, NOTHING_TO_DO),
    Replacement("torch.nn.Module", ("cuda",), devices.returns_self, NOTHING_TO_DO),
    Replacement("torch.Tensor", ("record_stream",), devices.returns(None),
                "memory is not reused behind a stream's back"),
    Replacement("torch.Tensor", ("type",), devices.cuda_type_name,
                "optimizers compare it with 'torch.cuda.FloatTensor'"),
    Replacement("torch.cuda", ("is_available", "is_initialized"), devices.returns(True), "Megatron asserts it"),
    Replacement("torch.accelerator", ("is_available",), devices.returns(False),
                "torch asks here: no pinning threads in data loaders, no graph-capture checks in optimizers"),
    Replacement("torch.cuda", ("device_count",), devices.device_count,
                "with 0, Megatron skips groups and seeds silently"),
    Replacement("torch.cuda", ("current_device",), devices.returns(0), CPU),
    Replacement("torch.cuda", ("set_device", "_lazy_init", "init", "empty_cache", "ipc_collect",
                "reset_peak_memory_stats"), devices.returns(None), NOTHING_TO_DO),
    Replacement("torch.cuda", ("_lazy_call",), devices.run_now, NOTHING_TO_DO),
    Replacement("torch.cuda", ("device",), devices.device_context, NOTHING_TO_DO),
    Replacement("torch.cuda", ("get_device_properties",), devices.device_properties, "asked by validation"),
    Replacement("torch.cuda", ("get_device_capability",), devices.returns((9, 0)), "asked by validation"),
    Replacement("torch.cuda", ("get_device_name",), devices.returns("cpu"), "logged"),
    Replacement("torch.cuda", ("memory_stats",), devices.memory_stats, LOGGED),
    Replacement("torch.cuda", ("memory_allocated", "max_memory_allocated", "memory_reserved",
                "max_memory_reserved", "device_memory_used"), devices.returns(0), LOGGED),
    Replacement("torch.cuda", ("CUDAGraph", "MemPool", "ExternalStream"), devices.refused,
                "no counterpart: constructing one is an error"),
    # Random numbers
    Replacement("torch.cuda", ("default_generators",), devices.default_generators, ONE_GENERATOR),
    Replacement("torch.cuda", ("get_rng_state",), devices.get_rng_state, ONE_GENERATOR),
    Replacement("torch.cuda", ("set_rng_state",), devices.set_rng_state, ONE_GENERATOR),
    Replacement("torch.cuda.random", ("get_rng_state",), devices.get_rng_state, ONE_GENERATOR),
    Replacement("torch.cuda.random", ("set_rng_state",), devices.set_rng_state, ONE_GENERATOR),
    Replacement("torch.cuda", ("manual_seed", "manual_seed_all"), devices.manual_seed, ONE_GENERATOR),
    # Streams
    Replacement("torch.cuda", ("Stream",), _is(streams.Stream), STREAMS),
    Replacement("torch.cuda", ("Event",), _is(streams.Event), STREAMS),
    Replacement("torch.cuda", ("stream", "StreamContext"), _is(streams.stream), STREAMS),
    Replacement("torch.cuda", ("current_stream",), _is(streams.current_stream), STREAMS),
    Replacement("torch.cuda", ("default_stream",), _is(streams.default_stream), STREAMS),
    Replacement("torch.cuda", ("set_stream",), _is(streams.set_stream), STREAMS),
    Replacement("torch.cuda", ("synchronize",), _is(streams.synchronize), STREAMS),
    Replacement("torch.cuda", ("is_current_stream_capturing",), devices.returns(False), "nothing is captured"),
    Replacement("torch.cuda.nvtx", ("range_push", "range_pop", "mark"), devices.returns(0), "no profiler"),
    # Process groups
    Replacement("torch.distributed", ("init_process_group",), distributed.init_process_group,
                "nccl becomes gloo; no device or NCCL options. Collectives stay as asynchronous as asked"),
    Replacement("torch.distributed", ("new_group",), distributed.new_group, "nccl becomes gloo; no NCCL options"),
    Replacement("torch.distributed.distributed_c10d", ("ProcessGroupGloo",), distributed.one_gloo_device,
                "each group would have a polling thread of its own, and Megatron makes dozens of groups"),
    # Megatron
    Replacement("megatron.training.arguments", ("parse_and_validate_args",), refusals.checked_parsing,
                "refuses, by name, what cannot work on CPU"),
    Replacement("megatron.training.initialize", ("_warmup_jit_function",), devices.returns(None),
                "nothing is compiled; its random inputs would change the weights that are drawn later"),
    Replacement("megatron.core.datasets.utils", ("compile_helpers",), megatron.compile_helpers,
                "runs `make` in a wheel without Makefile, though the compiled helper ships"),
    Replacement("megatron.core.tensor_parallel.random", ("CudaRNGStatesTracker",), megatron.quiet_rng_tracker,
                "warns that the CPU generator moved, which here is the CUDA one"),
    Replacement("megatron.core.transformer.moe.moe_utils", ("maybe_move_tensor_to_cpu",),
                megatron.maybe_move_tensor_to_cpu,
                "makes lists of the alltoall dispatcher's split sizes only when they are on a GPU"),
    Replacement("megatron.core.transformer.torch_norm", ("WrappedTorchNorm",), megatron.torch_norm,
                "refuses sequence parallelism, for which it only has to mark its parameters"),
    Replacement("megatron.core.inference.communication_utils", ("_is_cuda", "_is_cuda_contiguous"),
                devices.returns(None), "asserts that tensors between pipeline stages are on a GPU"),
    Replacement("megatron.core.optimizer.distrib_optimizer", ("DistributedOptimizer",),
                megatron.distributed_optimizer,
                "with torch's AdamW a checkpoint does not load (`assert len(steps) == 1`), and the loaded "
                "`step` would be one tensor shared by all parameters"),
    Replacement("megatron.core.dist_checkpointing.strategies.filesystem_async", ("FileSystemWriterAsync",),
                megatron.checkpoint_writer,
                "its copy to the CPU, before training goes on, is none: a background save would write later steps"),
)
# fmt: on


originals: dict[str, Any] = {}  # what has been replaced so far, by dotted name


def _resolve(path: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _apply(replacement: Replacement, owner: Any) -> None:
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


def install(allow_te: bool = False) -> None:
    if not allow_te:
        # `import transformer_engine` then raises ModuleNotFoundError, installed or not.
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    # Megatron's persistent checkpoint worker is a child of Python's fork server.
    multiprocessing.forkserver.set_forkserver_preload(["dsv3_megatron.cpu.child"])
    pending: dict[str, list[Replacement]] = {}
    for replacement in TABLE:
        if replacement.owner.startswith("megatron."):
            pending.setdefault(replacement.owner, []).append(replacement)
        else:
            _apply(replacement, _resolve(replacement.owner))
    sys.meta_path.insert(0, _AfterImport(pending))
