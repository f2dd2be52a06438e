"""Who the threads are, and where each of them stands."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.memory import Fault

__all__ = ["AT_BLOCK", "AT_CLUSTER", "AT_MBARRIER", "DONE", "READY", "Threads"]

Array = npt.NDArray[Any]
WARP = 32
READY, AT_BLOCK, AT_CLUSTER, AT_MBARRIER, DONE = range(5)


class Threads:
    """The threads of a range of blocks, block after block.

    Attributes:
        block: (lanes,) of each thread, counted within the range.
        position: basic block at which it stands.
        status: whether it can go on, or what it waits for.
    """

    def __init__(self, grid: tuple[int, int, int], size: int, cluster: int, running: range) -> None:
        if size % WARP or len(running) % cluster or running.start % cluster:
            raise ValueError("blocks are made of whole warps, and clusters of whole blocks")
        self.grid, self.size, self.cluster, self.running = grid, size, cluster, running
        self.count = size * len(running)
        self.lanes = np.arange(self.count)
        self.block = self.lanes // size
        self.warp = self.lanes // WARP
        self.position = np.zeros(self.count, np.int64)
        self.status = np.zeros(self.count, np.int8)

    def whole(self, lanes: Array, what: str) -> None:
        """A fault unless these are whole warps."""
        if len(lanes) % WARP or (lanes[::WARP] % WARP).any() or (lanes[WARP - 1 :: WARP] - lanes[::WARP] != 31).any():
            raise Fault(f"{what} in divergent code")

    def special(self, name: str) -> Array:
        return self._special[name]

    @cached_property
    def _special(self) -> dict[str, Array]:
        block = self.block + self.running.start
        x, y, _ = self.grid
        zero, one = np.zeros(self.count, np.uint32), np.ones(self.count, np.uint32)
        thread = self.lanes % self.size
        found = {
            "%tid.x": thread,
            "%tid.y": zero,
            "%tid.z": zero,
            "%ntid.x": self.size * one,
            "%ctaid.x": block % x,
            "%ctaid.y": block // x % y,
            "%ctaid.z": block // (x * y),
            **{f"%nctaid.{axis}": self.grid[place] * one for place, axis in enumerate("xyz")},
            "%laneid": thread % WARP,
            "%warpid": thread // WARP,
            "%cluster_ctarank": block % self.cluster,
            "%cluster_nctarank": self.cluster * one,
            "%cluster_ctaid.x": block % self.cluster,
            "%cluster_nctaid.x": self.cluster * one,
            "%clusterid.x": block // self.cluster,
        }
        return {name: values.astype(np.uint32) for name, values in found.items()}
