"""Bytes of live tensors while code runs: what `torch.cuda.max_memory_allocated` is on a GPU, for any device."""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the storages of all tensors that operators produce, until they are freed or resized.

    Scratch memory inside an operator is not a tensor, and not counted. One thread only: run pairs without a
    communication thread.

    Args:
        resident: counted from the start.
        ignored: never counted (the test's own data).
        label: called for each new storage; its answer is kept with the storage, for `at_peak`.

    Attributes:
        peak: most bytes so far.
        at_peak: (label, bytes) of every storage that lived then; filled only with `label`.
    """

    def __init__(
        self,
        resident: Iterable[Tensor] = (),
        ignored: Iterable[Tensor] = (),
        label: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self._label = label
        self._bytes: dict[int, int] = {}  # by id of the storage
        self._labels: dict[int, Any] = {}
        self._references: dict[int, weakref.ref] = {}
        # A tensor may be let go by another thread (of sends), or by the garbage collector in the midst of this.
        self._lock = threading.RLock()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self.now = self.peak = 0
        self.at_peak: list[tuple[Any, int]] = []
        for tensor in resident:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored:
            return
        if key not in self._bytes:
            with self._lock:
                self._references[key] = weakref.ref(storage, functools.partial(self._freed, key))
                self._bytes[key] = 0
                if self._label is not None:
                    self._labels[key] = self._label(tensor)
        self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        with self._lock:
            if key in self._bytes:
                self.now += storage.nbytes() - self._bytes[key]
                self._bytes[key] = storage.nbytes()
            if self.now > self.peak:
                self.peak = self.now
                if self._label is not None:
                    self.at_peak = self.snapshot()

    def _freed(self, key: int, _: object = None) -> None:
        with self._lock:
            self.now -= self._bytes.pop(key, 0)
            self._labels.pop(key, None)
            self._references.pop(key, None)

    def snapshot(self) -> list[tuple[Any, int]]:
        """(label, bytes) of every storage that lives now."""
        return [(self._labels.get(key), size) for key, size in list(self._bytes.items()) if size]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def __enter__(self) -> "LiveTensors":
        # A storage's own resize_ is no operator; Megatron's recompute frees tensors with it.
        original = torch.UntypedStorage.resize_
        self._original_resize = original

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._original_resize  # type: ignore[method-assign]
