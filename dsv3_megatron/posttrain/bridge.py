"""Between a trainer and rollout ranks that are another job: a group of the trainer's first rank and all of theirs.

The trainer listens at `--rollout-address`; `dsv3 rollouts --connect` goes there. Messages are JSON, weights are
broadcast tensor by tensor. gloo carries both, so weights on GPUs pass through host memory, never through a disk.
"""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.errors import RefusedArgument

__all__ = ["Bridge", "BridgeClosed", "split_address"]

START = timedelta(minutes=10)  # to find each other: the other job may still be loading
PATIENCE = timedelta(days=7)  # for a message: a lost process closes its connection, and is noticed at once


class BridgeClosed(RuntimeError):
    """The other job has ended."""


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT. RefusedArgument where it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RefusedArgument(f"{address}: give HOST:PORT, for instance 10.0.0.1:29600")
    return host, int(port)


class Bridge:
    """One end; every method is called at both ends in the same order.

    Args:
        address: HOST:PORT of the trainer's first rank.
        rank: 0 for the trainer, 1, 2, … for the rollout ranks.
        size: with the trainer; None at the trainer's end, which is told.
        wait: how long to look for the other job.

    Raises:
        RefusedArgument: nobody is there.
    """

    def __init__(self, address: str, rank: int, size: int | None = None, wait: timedelta = START) -> None:
        host, port = split_address(address)
        try:
            self._store = dist.TCPStore(host, port, is_master=rank == 0, wait_for_workers=False, timeout=wait)
            if rank == 1:
                self._store.set("size", str(size))
            self.size = int(self._store.get("size"))
            own = dist.PrefixStore("rollouts", self._store)
            self._group = dist.ProcessGroupGloo(own, rank, self.size, wait)
        except (dist.DistError, RuntimeError) as error:
            option = "--connect" if rank else "--rollout-address"
            other = (
                "the trainer, with this --rollout-address"
                if rank
                else "dsv3 rollouts --connect with this address"
            )
            raise RefusedArgument(
                f"{option} {address}: nobody is there ({str(error).splitlines()[0][:200]}). Start {other}, beside "
                "this job"
            ) from None
        self.rank = rank

    def tell(self, message: Any) -> None:
        """From the trainer to all rollout ranks: a JSON value."""
        data = _encoded(message)
        self.broadcast(torch.tensor([len(data)]))
        self.broadcast(data)

    def told(self) -> Any:
        """What the trainer tells."""
        data = torch.empty(int(self.broadcast(torch.zeros(1, dtype=torch.int64))), dtype=torch.uint8)
        return _decoded(self.broadcast(data))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The trainer's tensor, on the CPU, at both ends; shape and dtype are known at both."""
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = 0, PATIENCE
        self._wait(lambda: self._group.broadcast([tensor], options))
        return tensor

    def answer(self, message: Any) -> None:
        """From a rollout rank to the trainer: a JSON value."""
        data = _encoded(message)
        self._wait(lambda: self._group.send([torch.tensor([len(data)])], 0, 0))
        self._wait(lambda: self._group.send([data], 0, 0))

    def answers(self) -> Sequence[Any]:
        """What each rollout rank answers, at the trainer's end."""
        found = []
        for rank in range(1, self.size):
            length = torch.zeros(1, dtype=torch.int64)
            self._wait(lambda rank=rank, into=length: self._group.recv([into], rank, 0))
            data = torch.empty(int(length), dtype=torch.uint8)
            self._wait(lambda rank=rank, into=data: self._group.recv([into], rank, 0))
            found.append(_decoded(data))
        return found

    def close(self) -> None:
        """Leave; the other end notices."""
        del self._group, self._store

    @staticmethod
    def _wait(start: Any) -> None:
        try:
            start().wait(PATIENCE)
        except RuntimeError as error:
            raise BridgeClosed(
                f"the other job's end of the bridge is closed ({str(error).splitlines()[0][:200]})"
            ) from None


def _encoded(message: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)


def _decoded(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
