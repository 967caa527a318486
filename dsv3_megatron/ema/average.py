"""The average itself: one fp32 CPU tensor for each parameter of this rank, updated by a thread of its own."""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["WeightAverage"]


class WeightAverage:
    """average ← average + (1 − decay) · (parameter − average), in fp32, after each step.

    `update` returns at once. The parameters are read while the next forward and backward pass run, which do not
    change them; `wait` must be called before anything does. On a GPU a parameter crosses through a pinned buffer of the
    largest one's size, on a stream of its own; the average itself never crosses, and its memory is not pinned.

    The sums are done on the CPU, by a number of threads of its own: launchers set OMP_NUM_THREADS=1 for the training
    thread, with which the average of a large rank takes half a step.

    Args:
        parameters: this rank's own, by name; so the average is sharded as they are.
        decay: weight of the past, 0 < decay < 1. Unpublished for DeepSeek-V3.
        num_threads: CPU threads of an update; None takes what PyTorch uses already.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], decay: float, num_threads: int | None = None
    ) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.num_threads = num_threads
        on_gpu = any(map(_on_gpu, self.parameters.values()))
        # A new thread begins on device 0, whatever the device of the one that started it.
        self._device = torch.cuda.current_device() if on_gpu else None
        self.average = {
            name: torch.empty(p.shape, dtype=torch.float32, device="cpu").copy_(p.detach())
            for name, p in self.parameters.items()
        }
        self._side = torch.cuda.Stream() if on_gpu else None
        self._buffers = _pinned_buffers(self.parameters.values()) if on_gpu else {}
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()  # an event of the GPU, None without one
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="weight-average", daemon=True).start()

    def update(self) -> None:
        """Begin the update for the parameters as they are now."""
        self.wait()
        self._idle.clear()
        written = None
        if self._side is not None:
            written = torch.cuda.Event()
            written.record()
        self._jobs.put(written)

    def wait(self) -> None:
        """Return when no update is under way; raises what one has failed with."""
        self._idle.wait()
        if self._error is not None:
            raise RuntimeError("the average of the weights could not be updated") from self._error

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the parameters hold the average; their own values wait in CPU memory."""
        self.wait()
        with torch.no_grad():
            kept = {name: torch.empty_like(p, device="cpu").copy_(p) for name, p in self.parameters.items()}
            self.put()
            try:
                yield
            finally:
                for name, p in self.parameters.items():
                    p.copy_(kept[name])

    @torch.no_grad()
    def put(self) -> None:
        """Write the average into the parameters, for good."""
        self.wait()
        for name, p in self.parameters.items():
            p.copy_(self.average[name])

    def _work(self) -> None:
        self._prepare_thread()
        while True:
            written = self._jobs.get()
            try:
                self._update(written)
            except BaseException as error:  # for the training thread to raise
                self._error = error
            self._idle.set()

    def _prepare_thread(self) -> None:
        """This thread's device and number of CPU threads; both belong to the thread that asks for them."""
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            if self.num_threads is not None:
                torch.set_num_threads(self.num_threads)
        except BaseException as error:  # for the training thread to raise
            self._error = error

    @torch.no_grad()
    def _update(self, written: Any) -> None:
        for name, p in self.parameters.items():
            now = p.detach() if self._side is None else self._to_cpu(p.detach(), written)
            self.average[name].lerp_(now.float(), 1 - self.decay)

    def _to_cpu(self, parameter: Tensor, written: Any) -> Tensor:
        assert self._side is not None and written is not None
        buffer = self._buffers[parameter.dtype][: parameter.numel()].view(parameter.shape)
        with torch.cuda.stream(self._side):
            self._side.wait_event(written)
            buffer.copy_(parameter, non_blocking=True)
        self._side.synchronize()
        return buffer


def _on_gpu(parameter: Tensor) -> bool:
    return parameter.is_cuda


def _pinned_buffers(parameters: Iterable[Tensor]) -> dict[torch.dtype, Tensor]:
    """A pinned buffer of the largest parameter's size for each type."""
    sizes: dict[torch.dtype, int] = {}
    for p in parameters:
        sizes[p.dtype] = max(sizes.get(p.dtype, 0), p.numel())
    return {dtype: torch.empty(size, dtype=dtype, pin_memory=True) for dtype, size in sizes.items()}
