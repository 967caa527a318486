"""Device stand-ins: whoever asks for a CUDA device gets the CPU."""

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

CPU = torch.device("cpu")


def to_cpu(device: Any) -> Any:
    """CPU for `"cuda"`, `"cuda:1"`, `torch.device("cuda")` or a device index; anything else as it is."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return CPU
    return device


def redirect_keyword(function: Callable) -> Callable:
    """Wrap a function that takes `device=` by keyword only (factories, `Tensor.new_*`); pinning needs a GPU."""

    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return redirected


def redirect_first(function: Callable) -> Callable:
    """Wrap a method whose device may be its first positional argument (`Tensor.to`, `Module.to`)."""

    @functools.wraps(function)
    def redirected(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], (torch.Tensor, torch.dtype)):
            args = (to_cpu(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = to_cpu(kwargs["device"])
        return function(self, *args, **kwargs)

    return redirected


def redirect_generator(original: type) -> type:
    class Generator(original):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return original.__new__(cls, to_cpu(device))

    return Generator


def returns_self(_original: Any) -> Callable:
    return lambda self, *args, **kwargs: self


def returns(value: Any) -> Callable[[Any], Callable]:
    """A stand-in that ignores its arguments and returns `value`."""
    return lambda _original: lambda *args, **kwargs: value


def cuda_type_name(original: Callable) -> Callable:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    return type_


def run_now(_original: Any) -> Callable:
    """`torch.cuda._lazy_call(callback)`: nothing to wait for."""
    return lambda callback, **_kwargs: callback()


def device_count(_original: Any) -> Callable:
    return lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_context(_original: Any) -> type:
    class device(contextlib.nullcontext):
        """`torch.cuda.device(index)`."""

        def __init__(self, device: Any = None) -> None:
            super().__init__()

    return device


# The device that is asked about: this machine, unless `cpu.pretend_gpu` says another.
gpu = SimpleNamespace(
    name="cpu",
    major=9,
    minor=0,
    total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    multi_processor_count=1,
    warp_size=32,
)


def device_properties(_original: Any) -> Callable:
    return lambda device=None: gpu


def device_capability(_original: Any) -> Callable:
    return lambda device=None: (gpu.major, gpu.minor)


def memory_stats(_original: Any) -> Callable:
    return lambda device=None: defaultdict(int)


def default_generators(_original: Any) -> tuple[torch.Generator, ...]:
    return (torch.default_generator,)


def get_rng_state(_original: Any) -> Callable:
    return lambda device=None: torch.default_generator.get_state()


def set_rng_state(_original: Any) -> Callable:
    return lambda new_state, device=None: torch.default_generator.set_state(new_state)


def manual_seed(_original: Any) -> Callable:
    def seed_cpu(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    return seed_cpu


def refused(original: type) -> type:
    """A class of the same name that cannot be constructed."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"torch.cuda.{original.__name__} does not exist on CPU; it was asked for while dsv3_megatron.cpu is "
            "active."
        )

    return type(original.__name__, (), {"__init__": refuse})
