"""Data races in shared memory: what a warp wrote, another may touch only after both met at a barrier of all threads.

Time is counted in epochs, which end when a block barrier or cluster barrier opens. Two warps that access one place in
the same epoch, one of them writing, are a fault, whatever the values are. Two that write are not: copies of one value
in several warps are written by each of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.memory import Fault

__all__ = ["Races"]

Array = npt.NDArray[Any]
WARPS = 1 << 20
# in place of a warp
MANY = WARPS - 1


class Races:
    """The last access to each cell of ``grain`` bytes, as epoch * WARPS + warp.

    Args:
        grain: bytes of the smallest access.
    """

    def __init__(self, blocks: int, size: int, grain: int) -> None:
        self.grain = grain
        self.written = np.full(size // grain, -1, np.int64)
        self.read = np.full(size // grain, -1, np.int64)
        self.epoch = np.zeros(blocks, np.int64)

    def _cells(self, places: Array, size: int) -> Array:
        return (places // self.grain)[:, None] + np.arange(size // self.grain)

    def reading(self, places: Array, size: int, blocks: Array, warps: Array) -> None:
        cells = self._cells(places, size)
        epoch = self.epoch[blocks][:, None] * WARPS
        mine = epoch + warps[:, None]
        before = self.written[cells]
        if ((before >= epoch) & (before != mine)).any():
            raise Fault("a data race: a read of what another warp writes before the next barrier")
        before = self.read[cells]
        shared = (before >= epoch) & (before != mine)
        self.read[cells] = mine
        # several warps in this very access
        shared |= self.read[cells] != mine
        if shared.any():
            self.read[cells[shared]] = np.broadcast_to(epoch, cells.shape)[shared] + MANY

    def writing(self, places: Array, size: int, blocks: Array, warps: Array) -> None:
        cells = self._cells(places, size)
        epoch = self.epoch[blocks][:, None] * WARPS
        mine = epoch + warps[:, None]
        before = self.read[cells]
        if ((before >= epoch) & (before != mine)).any():
            raise Fault("a data race: a write to what another warp reads since the last barrier")
        self.written[cells] = mine
