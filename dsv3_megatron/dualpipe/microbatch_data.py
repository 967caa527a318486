"""Microbatches for a V: which chunk of which rank sees which data.

A direction's microbatches enter at the first stage of one replica and leave at the last stage of its mirror (of itself
where nothing is mirrored). Under DualPipe a rank's first chunk works on its own replica's data and its second chunk on
the mirror's. Megatron gives every replica its own part of the global batch; mirrors swap theirs once at the start of a
step.

Nothing is read before it is needed, except what a mirror is waiting for.
"""

import pickle
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def chunk_iterators(
    iterator: Iterator | None, num_microbatches: int, mirror: int | None, group: Any, num_chunks: int = 2
) -> list:
    """Data iterators of a rank's chunks for one step.

    Args:
        iterator: this rank's own data, None on ranks that read none (as Megatron gives it).
        num_microbatches: microbatches of one direction; so many are taken from `iterator`.
        mirror: global rank of the mirror, None where there is none.
        group: process group that holds this rank and its mirror.
        num_chunks: 2 where there is a mirror.

    Returns:
        Of each chunk an iterator over batches (dicts of tensors), or None.
    """
    if iterator is None:
        return [None] * num_chunks
    if mirror is None:
        shared = _Shared(iterator, num_microbatches)
        return [shared.reader() for _ in range(num_chunks)]
    own = [next(iterator) for _ in range(num_microbatches)]
    others = _pinned(swap(own, mirror, group))
    # Megatron's get_batch writes into the dict it is given: each chunk gets dicts of its own.
    return [iter([dict(batch) for batch in batches]) for batches in (own, others)]


class _Shared:
    """One iterator read by the chunks of a rank, each in its own time: a microbatch is read when the first of them
    asks for it and kept until the last has had it (for the step, where a chunk between them reads nothing).
    """

    def __init__(self, iterator: Iterator, num_microbatches: int) -> None:
        self.iterator, self.left = iterator, num_microbatches
        self.waiting: list[deque] = []

    def reader(self) -> Iterator:
        """The microbatches of this step for one chunk."""
        mine: deque = deque()
        self.waiting.append(mine)
        return self._read(mine)

    def _read(self, mine: deque) -> Iterator:
        while mine or self.left:
            if not mine:
                self.left -= 1
                batch = next(self.iterator)
                for queue in self.waiting:
                    # Megatron's get_batch writes into the dict it is given: each chunk gets dicts of its own.
                    queue.append(dict(batch))
            yield mine.popleft()


def _pinned(batches: Any) -> Any:
    """Received batches in pinned memory, as a data loader's own are, so that they cross to the GPU unseen."""
    return [
        {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
        for batch in batches
    ]


def swap(value: Any, peer: int, group: Any) -> Any:
    """Send a picklable value to `peer` and return what it sent; both call this at the same point of the step."""
    device = torch.cuda.current_device()
    payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    length = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    their_length = torch.empty_like(length)
    _swap_tensors(length, their_length, peer, group)
    received = torch.empty(int(their_length), dtype=torch.uint8, device=device)
    _swap_tensors(payload, received, peer, group)
    return pickle.loads(received.cpu().numpy().tobytes())


def _swap_tensors(send: torch.Tensor, receive: torch.Tensor, peer: int, group: Any) -> None:
    ops = [dist.P2POp(dist.isend, send, peer, group), dist.P2POp(dist.irecv, receive, peer, group)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
