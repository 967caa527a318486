"""`torch.distributed` stand-ins: NCCL groups become gloo groups."""

import functools
from collections.abc import Callable
from typing import Any

KEPT_BACKENDS = ("gloo", "fake", "mpi")


def gloo_backend(backend: Any) -> str:
    return backend if backend in KEPT_BACKENDS else "gloo"


def init_process_group(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        return original(gloo_backend(backend), *args, **kwargs)

    return init


def new_group(original: Callable) -> Callable:
    @functools.wraps(original)
    def new(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **kw: Any
    ) -> Any:
        kw.pop("device_id", None)
        # None keeps the default group's backend, which is gloo or fake.
        return original(ranks, timeout, None if backend is None else gloo_backend(backend), None, **kw)

    return new
