"""Where threads wait for each other: block barriers, cluster barriers, mbarriers; and what becomes visible there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.asynchronous import Engine
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.shared import RANK_SHIFT, Shared
from tests.kernels.ptx.threads import AT_BLOCK, AT_CLUSTER, AT_MBARRIER, DONE, READY, Threads

__all__ = ["Meeting"]

Array = npt.NDArray[Any]


class Meeting:
    def __init__(self, threads: Threads, shared: Shared, engine: Engine) -> None:
        self.threads, self.shared, self.engine = threads, shared, engine
        count = threads.count
        self.number = np.zeros(count, np.int64)  # of the block barrier that a thread waits at
        self.wanted = np.zeros(count, np.int64)  # threads that it waits for, itself included
        self.clusters = threads.block // threads.cluster
        self.arrived = np.zeros(count, bool)  # at the cluster barrier, without having waited
        self.token = np.zeros(count, np.int64)
        self.generation = np.zeros(len(threads.running) // threads.cluster, np.int64)
        self.address = np.zeros(count, np.int64)  # of the mbarrier
        self.parity = np.zeros(count, np.int64)

    def describe(self) -> str:
        names = {AT_BLOCK: "a block barrier", AT_CLUSTER: "the cluster barrier", AT_MBARRIER: "an mbarrier"}
        counted = Counter(self.threads.status.tolist())
        return ", ".join(f"{count} at {names[status]}" for status, count in counted.items() if status in names)

    def block_barrier(self, lanes: Array, number: int, wanted: int) -> None:
        threads = self.threads
        threads.status[lanes] = AT_BLOCK
        self.number[lanes], self.wanted[lanes] = number, wanted or threads.size
        for block in np.unique(threads.block[lanes]):
            mine = slice(int(block) * threads.size, (int(block) + 1) * threads.size)
            waiting = (threads.status[mine] == AT_BLOCK) & (self.number[mine] == number)
            if (self.wanted[mine][waiting] != (wanted or threads.size)).any():
                raise Fault("threads that do not agree on how many meet at a barrier")
            if np.count_nonzero(waiting) == (wanted or threads.size):
                threads.status[mine][waiting] = READY
                self.shared.observe(int(block))

    def cluster_arrive(self, lanes: Array, relaxed: bool) -> None:
        if self.arrived[lanes].any():
            raise Fault("two arrivals at the cluster barrier without a wait")
        blocks = self.threads.block[lanes]
        if not relaxed:
            for block in np.unique(blocks):
                self.shared.release(int(block), lanes[blocks == block])
        self.arrived[lanes] = True
        self.token[lanes] = self.generation[self.clusters[lanes]]
        self._open(np.unique(self.clusters[lanes]))

    def _open(self, clusters: Array) -> None:
        """Where all that have not ended arrived since the barrier was last open."""
        size = self.threads.size * self.threads.cluster
        for cluster in clusters:
            mine = slice(int(cluster) * size, (int(cluster) + 1) * size)
            left = self.threads.status[mine] != DONE
            here = self.arrived[mine] & (self.token[mine] == self.generation[cluster])
            if left.any() and here[left].all():
                self.generation[cluster] += 1
                blocks = self.threads.cluster
                self.shared.races.epoch[int(cluster) * blocks : (int(cluster) + 1) * blocks] += 1
                waiting = self.threads.status[mine] == AT_CLUSTER
                self.threads.status[mine][waiting] = READY
                self.arrived[mine][waiting] = False

    def cluster_wait(self, lanes: Array) -> None:
        if not self.arrived[lanes].all():
            raise Fault("a wait at the cluster barrier without an arrival")
        over = self.token[lanes] < self.generation[self.clusters[lanes]]
        self.arrived[lanes[over]] = False
        self.threads.status[lanes[~over]] = AT_CLUSTER

    def passed(self, lanes: Array, addresses: Array, parities: Array) -> Array:
        given = zip(self.threads.block[lanes].tolist(), addresses.tolist(), parities.tolist(), strict=True)
        known: dict[tuple[int, int, int], bool] = {}
        for key in given:
            if key not in known:
                known[key] = self.engine.passed(*key)
        given = zip(self.threads.block[lanes].tolist(), addresses.tolist(), parities.tolist(), strict=True)
        return np.array([known[key] for key in given], bool)

    def wait_at_mbarrier(self, lanes: Array, addresses: Array, parities: Array) -> None:
        self.threads.status[lanes] = AT_MBARRIER
        self.address[lanes], self.parity[lanes] = addresses, parities

    def wake_at_mbarriers(self) -> None:
        lanes = np.flatnonzero(self.threads.status == AT_MBARRIER)
        if len(lanes):
            woken = lanes[self.passed(lanes, self.address[lanes], self.parity[lanes])]
            self.threads.status[woken] = READY

    def peer_address(self, addresses: Array, ranks: Array) -> Array:
        if (ranks >= self.threads.cluster).any():
            raise Fault("a block outside the cluster")
        return addresses + ((ranks.astype(np.uint32) + np.uint32(1)) << np.uint32(RANK_SHIFT))

    def load_peer(self, addresses: Array, lanes: Array, size: int, dtype: Any) -> Array:
        ranks = (addresses >> np.uint32(RANK_SHIFT)).astype(np.int64)
        local = addresses & np.uint32((1 << RANK_SHIFT) - 1)
        own = self.threads.block[lanes]
        blocks = np.where(ranks == 0, own, own - own % self.threads.cluster + ranks - 1)
        found = self.shared.load_peer(local, blocks, size, dtype)
        mine = blocks == own
        if mine.any():
            # a block sees what it wrote itself
            warps = self.threads.warp[lanes[mine]]
            found[mine] = self.shared.load(local[mine], blocks[mine], size, dtype, warps)
        return found

    def end(self, lanes: Array) -> None:
        """Threads exit."""
        threads = self.threads
        threads.status[lanes] = DONE
        for block in np.unique(threads.block[lanes]):
            if (threads.status[int(block) * threads.size : (int(block) + 1) * threads.size] == DONE).all():
                self.engine.end(int(block))
                self.shared.end(int(block))
        self._open(np.unique(self.clusters[lanes]))
