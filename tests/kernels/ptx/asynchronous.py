"""What goes on beside the threads: bulk copies, the mbarriers that count them, and the copies of single threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.memory import Fault, Global
from tests.kernels.ptx.shared import BASE, Shared

__all__ = ["Engine"]

Array = npt.NDArray[Any]


@dataclass
class Mbarrier:
    """A phase ends when as many threads have arrived as were expected, and as many bytes have come."""

    expected: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        self.pending = self.expected

    def settle(self) -> None:
        if self.pending < 0:
            raise Fault("more arrivals at an mbarrier than it was initialised for")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected


@dataclass
class BulkCopy:
    block: int
    offset: int
    source: int
    size: int
    barrier: Mbarrier


@dataclass
class ThreadCopies:
    """`cp.async` of one instruction: into shared memory, padded with zeros."""

    lanes: Array
    blocks: Array
    targets: Array
    sources: Array
    size: int
    taken: Array
    group: Array
    done: Array = field(init=False)

    def __post_init__(self) -> None:
        self.done = np.zeros(len(self.lanes), bool)


class Engine:
    """Copies wait in a queue, and land when they are drawn from it.

    Args:
        lanes: threads that run.
        haste: the chance that a copy by a thread lands at once and not when it is waited for.
    """

    def __init__(self, memory: Global, shared: Shared, lanes: int, generator: np.random.Generator, haste: float):
        self.memory, self.shared, self.generator, self.haste = memory, shared, generator, haste
        self.barriers: dict[tuple[int, int], Mbarrier] = {}
        self.queue: list[BulkCopy] = []
        self.copies: list[ThreadCopies] = []
        self.committed = np.zeros(lanes, np.int64)

    def barrier(self, block: int, address: int) -> Mbarrier:
        found = self.barriers.get((block, address))
        if found is None:
            raise Fault("an mbarrier that was not initialised")
        return found

    def init(self, block: int, address: int, count: int, lane: int) -> None:
        if address % 8:
            raise Fault("a misaligned mbarrier")
        if (block, address) in self.barriers:
            raise Fault("an mbarrier that was initialised before")
        self.barriers[block, address] = Mbarrier(count)
        # its bits are its own
        garbage = self.generator.integers(0, 1 << 32, (1, 2), np.uint32)
        self.shared.store(np.array([address]), np.array([block]), garbage, np.array([lane], np.int32))

    def invalidate(self, block: int, address: int) -> None:
        self.barrier(block, address)
        del self.barriers[block, address]

    def arrive(self, block: int, address: int, count: int, size: int) -> None:
        barrier = self.barrier(block, address)
        barrier.bytes += size
        barrier.pending -= count
        barrier.settle()

    def passed(self, block: int, address: int, parity: int) -> bool:
        return self.barrier(block, address).phase % 2 != parity & 1

    def start(self, block: int, target: int, source: int, size: int, address: int) -> None:
        """A bulk copy, in one or two pieces."""
        if size % 16 or target % 16 or source % 16:
            raise Fault("a bulk copy that is not made of aligned 16 bytes")
        if size <= 0:
            raise Fault("a bulk copy of no bytes")
        barrier = self.barrier(block, address)
        self.shared.check_engine(block, address - BASE, 8, "a bulk copy reports")
        self.shared.check_engine(block, target - BASE, size, "a bulk copy writes")
        cut = 16 * int(self.generator.integers(0, size // 16))
        for begin, end in ((0, cut), (cut, size)):
            if end > begin:
                self.queue.append(BulkCopy(block, target - BASE + begin, source + begin, end - begin, barrier))
        # bounds are those of the time when it begins, too
        read = self.memory.read
        self.memory.copy_out(source, size)
        self.memory.read = read

    def land(self, chance: float) -> bool:
        """Some of the copies that wait, one at least if the chance is 1; returns whether any bulk copy did."""
        landed = False
        for index in self.generator.permutation(len(self.queue)):
            if self.generator.random() < chance:
                copy = self.queue[index]
                self.shared.arrive_from_engine(copy.block, copy.offset, self.memory.copy_out(copy.source, copy.size))
                copy.barrier.bytes -= copy.size
                copy.barrier.settle()
                self.queue[index] = None  # type: ignore[call-overload]
                landed = True
                if chance == 1.0:
                    break
        self.queue = [copy for copy in self.queue if copy is not None]
        for copies in self.copies:
            if self.generator.random() < chance:
                self._finish(copies, self.generator.random(len(copies.lanes)) < 0.5)
        return landed

    def copy(self, lanes: Array, blocks: Array, targets: Array, sources: Array, size: int, taken: Array) -> None:
        """`cp.async`: ``taken`` of ``size`` bytes come from global memory, the others are 0."""
        given = ThreadCopies(lanes, blocks, targets, sources, size, taken, self.committed[lanes])
        self.shared.place(targets, blocks, size)
        if self.generator.random() < self.haste:
            self._finish(given, np.ones(len(lanes), bool))
        else:
            self.copies.append(given)

    def commit(self, lanes: Array) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: Array, newest: int | None) -> None:
        """For all groups of these threads but the newest; None waits for what was not committed, too."""
        waiting = np.zeros(len(self.committed), bool)
        waiting[lanes] = True
        for copies in self.copies:
            due = waiting[copies.lanes]
            if newest is not None:
                due &= copies.group < self.committed[copies.lanes] - newest
            self._finish(copies, due)
        self.copies = [copies for copies in self.copies if not copies.done.all()]

    def _finish(self, given: ThreadCopies, due: Array) -> None:
        chosen = np.flatnonzero(due & ~given.done)
        if not len(chosen):
            return
        given.done[chosen] = True
        size = given.size
        values = np.zeros((len(chosen), size), np.uint8)
        for length in np.unique(given.taken[chosen]):
            some = given.taken[chosen] == length
            if length:
                # less than the whole is not aligned to it
                step = int(length & -length)
                self.memory.read += int(length) * int(np.count_nonzero(some))
                parts = [
                    self.memory.load(given.sources[chosen][some] + np.uint64(at), step, np.uint8)
                    for at in range(0, int(length), step)
                ]
                values[some, : int(length)] = np.concatenate(parts, 1)
        self.shared.store(given.targets[chosen], given.blocks[chosen], values, given.lanes[chosen].astype(np.int32))

    def end(self, block: int) -> None:
        if any(copy.block == block for copy in self.queue):
            raise Fault("a block ended with a bulk copy under way")
        self.barriers = {key: barrier for key, barrier in self.barriers.items() if key[0] != block}
