"""The most memory that is alive at one time, by storages: views share one, and it is free when its last tensor is."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

__all__ = ["Memory"]


class Memory:
    """Bytes of a device that operations made, and the most of them at one time.

    What is there before it is first seen as an argument was there before the call, and is not counted.

    Attributes:
        alive: bytes now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        self.alive = 0
        self.peak = 0
        # by the address of the storage; a finalizer takes it away
        self._known: dict[int, int] = {}

    def given(self, tensors: Iterable[Tensor]) -> None:
        """Arguments of an operation."""
        for tensor in tensors:
            self._see(tensor, 0)

    def made(self, tensors: Iterable[Tensor]) -> None:
        """Results of an operation, after its arguments."""
        for tensor in tensors:
            self._see(tensor, None)

    def _see(self, tensor: Tensor, size: int | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size
        self._known[key] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        # the Python object of a storage lives as long as the storage
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.alive -= self._known.pop(key)
