"""`torch.distributed` stand-ins: NCCL groups become gloo groups."""

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import default_pg_timeout

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


def all_gather(original: Callable) -> Callable:
    @functools.wraps(original)
    def gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        sizes = [part.shape[0] if part.dim() else 1 for part in tensor_list]
        if async_op or len(set(sizes)) == 1:
            return original(tensor_list, tensor, group, async_op)
        sent = tensor.repeat(len(sizes), *[1] * (tensor.dim() - 1))
        received = tensor.new_empty(sum(sizes), *tensor.shape[1:])
        dist.all_to_all_single(received, sent, sizes, [len(tensor)] * len(sizes), group)
        for part, got in zip(tensor_list, received.split(sizes), strict=True):
            part.copy_(got)

    return gather


def reduce_scatter(original: Callable) -> Callable:
    @functools.wraps(original)
    def reduce(
        output: Tensor,
        input_list: list[Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [part.shape[0] if part.dim() else 1 for part in input_list]
        if async_op or op != dist.ReduceOp.SUM or len(set(sizes)) == 1:
            return original(output, input_list, op, group, async_op)
        received = output.new_empty(len(sizes), *output.shape)
        own = [len(output)] * len(sizes)
        dist.all_to_all_single(received.flatten(0, 1), torch.cat(input_list), own, sizes, group)
        output.copy_(received.sum(0))

    return reduce


def one_gloo_device(original: type) -> type:
    class ProcessGroupGloo(original):  # type: ignore[misc, valid-type]
        """Every gloo device has a thread that polls a hundred times a second; all groups use the same one."""

        _device: tuple[int, Any] | None = None  # with its process: threads do not survive a fork

        def __init__(
            self, store: Any, rank: int, size: int, timeout: timedelta = default_pg_timeout, **settings: Any
        ) -> None:
            shared = ProcessGroupGloo
            if shared._device is None or shared._device[0] != os.getpid():
                shared._device = (os.getpid(), original.create_default_device())  # type: ignore[attr-defined]
            options = original._Options()  # type: ignore[attr-defined]
            options._devices, options._timeout = [shared._device[1]], timeout
            for name, value in settings.items():
                setattr(options, name, value)
            super().__init__(store, rank, size, options)

    return ProcessGroupGloo
