"""Shared memory of the blocks that run: what each of them sees of it, and what others and the copy engine see.

- Warps that touch the same place without a barrier between them are a fault, see `races`.
- It begins as garbage, and ends with its block.
- Another block of the cluster sees what was written before an arrival with release at the cluster barrier, by the
  thread that arrives or, before a block barrier, by any thread of its block. Until then it sees what was there before.
- The copy engine (the "async proxy") must not touch what threads wrote without `fence.proxy.async` between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.races import Races

__all__ = ["BASE", "RANK_SHIFT", "Shared"]

Array = npt.NDArray[Any]
# the first KiB belongs to the driver, so that address 0 is a fault
BASE = 1024
# an address in another block holds its rank in the cluster, plus 1, above this bit
RANK_SHIFT = 24
NOBODY, OBSERVED = -1, -2
WARP = 32


class Shared:
    """``blocks`` times ``size`` bytes.

    Args:
        clustered: blocks see each other's memory.
        proxied: there is an engine beside the threads that reads or writes it.
        grain: bytes of the smallest access.
    """

    def __init__(
        self, blocks: int, size: int, clustered: bool, proxied: bool, grain: int, generator: np.random.Generator
    ) -> None:
        self.size = size
        # a spare piece, since a vector of what is there must be aligned
        self.pitch = size + -size % 128 + 128
        self.bytes = generator.integers(0, 256, blocks * self.pitch, np.uint8)
        self.peers = self.bytes.copy() if clustered else None
        self.writers = np.full(blocks * self.pitch, NOBODY, np.int32) if proxied else None
        self.pending: dict[int, list[tuple[int, Array, Array]]] = {block: [] for block in range(blocks)}
        self.alive = np.ones(blocks, bool)
        self.generator = generator
        self.races = Races(blocks, blocks * self.pitch, grain)

    def place(self, addresses: Array, blocks: Array, size: int) -> Array:
        """Positions in ``bytes``, checked."""
        offsets = addresses.astype(np.int64) - BASE
        if ((offsets < 0) | (offsets + size > self.size)).any():
            wrong = int(offsets[(offsets < 0) | (offsets + size > self.size)][0])
            raise Fault(f"out of bounds in shared memory: {size} bytes at {wrong} of {self.size}")
        if (offsets % size).any():
            raise Fault(f"a misaligned access of {size} bytes to shared memory")
        return offsets + blocks * self.pitch

    def load(self, addresses: Array, blocks: Array, size: int, dtype: Any, warps: Array) -> Array:
        """(n, size / itemsize) numbers."""
        count = size // np.dtype(dtype).itemsize
        places = self.place(addresses, blocks, size)
        self.races.reading(places, size, blocks, warps)
        return self.bytes.view(dtype).reshape(-1, count)[places // size]

    def load_peer(self, addresses: Array, blocks: Array, size: int, dtype: Any) -> Array:
        """From other blocks, as they have published it."""
        if not self.alive[blocks].all():
            raise Fault("shared memory of a block that has ended")
        assert self.peers is not None
        count = size // np.dtype(dtype).itemsize
        return self.peers.view(dtype).reshape(-1, count)[self.place(addresses, blocks, size) // size]

    def store(self, addresses: Array, blocks: Array, values: Array, lanes: Array) -> None:
        count = values.shape[1]
        size = values.dtype.itemsize * count
        places = self.place(addresses, blocks, size)
        self.races.writing(places, size, blocks, lanes // WARP)
        self.bytes.view(values.dtype).reshape(-1, count)[places // size] = values
        if self.writers is not None:
            self.writers.reshape(-1, size)[places // size] = lanes[:, None]
        if self.peers is not None:
            for block in np.unique(blocks):
                chosen = blocks == block
                self.pending[int(block)].append((size, places[chosen] // size, lanes[chosen]))

    def arrive_from_engine(self, block: int, offset: int, values: Array) -> None:
        """Bytes that a copy brought."""
        place = block * self.pitch + offset
        self.bytes[place : place + len(values)] = values
        if self.peers is not None:
            self.peers[place : place + len(values)] = values

    def observe(self, block: int) -> None:
        """A block barrier: what each thread wrote, all of the block have seen."""
        self.races.epoch[block] += 1
        self.pending[block] = [(size, places, np.full_like(who, OBSERVED)) for size, places, who in self.pending[block]]
        if self.writers is not None:
            mine = self.writers[block * self.pitch : (block + 1) * self.pitch]
            mine[mine >= 0] = OBSERVED

    def release(self, block: int, lanes: Array) -> None:
        """Threads of a block publish what they wrote and have seen."""
        if self.peers is None:
            return
        left = []
        for size, places, who in self.pending[block]:
            seen = (who == OBSERVED) | np.isin(who, lanes)
            self.peers.reshape(-1, size)[places[seen]] = self.bytes.reshape(-1, size)[places[seen]]
            if not seen.all():
                left.append((size, places[~seen], who[~seen]))
        self.pending[block] = left

    def fence(self, block: int, lanes: Array) -> None:
        """The engine may see what these threads wrote and have seen."""
        if self.writers is None:
            return
        mine = self.writers[block * self.pitch : (block + 1) * self.pitch]
        mine[(mine == OBSERVED) | np.isin(mine, lanes)] = NOBODY

    def check_engine(self, block: int, offset: int, size: int, what: str) -> None:
        if offset < 0 or offset + size > self.size:
            raise Fault(f"{what} out of bounds in shared memory")
        assert self.writers is not None
        place = block * self.pitch + offset
        if (self.writers[place : place + size] != NOBODY).any():
            raise Fault(f"{what} to memory that threads wrote, without a fence.proxy.async between")

    def end(self, block: int) -> None:
        """The block has ended, another one may use its memory."""
        self.alive[block] = False
        mine = slice(block * self.pitch, (block + 1) * self.pitch)
        self.bytes[mine] = self.generator.integers(0, 256, self.pitch, np.uint8)
