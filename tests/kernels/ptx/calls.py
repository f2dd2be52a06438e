"""What translated code asks of the machine. ``I`` are the lanes that stand at the block: a slice, or their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx import matrices
from tests.kernels.ptx.asynchronous import Engine
from tests.kernels.ptx.meeting import Meeting
from tests.kernels.ptx.memory import Fault, Global
from tests.kernels.ptx.products import Products
from tests.kernels.ptx.shared import Shared
from tests.kernels.ptx.threads import WARP, Threads

__all__ = ["Calls"]

Array = npt.NDArray[Any]


class Calls:
    threads: Threads
    memory: Global
    shared: Shared
    engine: Engine
    meeting: Meeting
    products: Products
    parameter_bytes: bytes

    def special(self, name: str, I: Any) -> Array:  # noqa: E741
        return self.threads.special(name)[I]

    def same(self, values: Array) -> int:
        if (values != values[0]).any():
            raise Fault("an address of parameters that threads do not agree upon")
        return int(values[0])

    def parameters(self, place: int, dtype: Any, count: int, lanes: int) -> list[Array]:
        size = np.dtype(dtype).itemsize
        if place < 0 or place + size * count > len(self.parameter_bytes):
            raise Fault("out of bounds in the parameters")
        return [np.full(lanes, value) for value in np.frombuffer(self.parameter_bytes, dtype, count, place)]

    def _chosen(self, mask: Array | None, I: Any) -> tuple[Any, Array]:  # noqa: E741
        """Which elements of a vector are meant, and their lanes."""
        lanes = self.threads.lanes[I]
        if mask is None or mask.all():
            return slice(None), lanes
        chosen = np.flatnonzero(mask)
        return chosen, lanes[chosen]

    def _spread(self, found: Array, chosen: Any, count: int) -> Array:
        """(count of numbers, lanes), 0 where nothing was loaded."""
        if isinstance(chosen, slice):
            return np.ascontiguousarray(found.T)
        result = np.zeros((found.shape[1], count), found.dtype)
        result[:, chosen] = found.T
        return result

    def load_global(self, addresses: Array, size: int, dtype: Any, mask: Array | None, I: Any) -> Array:  # noqa: E741
        chosen, lanes = self._chosen(mask, I)
        if not len(lanes):
            return np.zeros((size // np.dtype(dtype).itemsize, len(addresses)), dtype)
        given = addresses[chosen]
        self.memory.read += self.memory.traffic(given, size, self.threads.warp[lanes])
        return self._spread(self.memory.load(given, size, dtype), chosen, len(addresses))

    def store_global(self, addresses: Array, values: list[Array], dtype: Any, mask: Array | None, I: Any) -> None:  # noqa: E741
        chosen, lanes = self._chosen(mask, I)
        if len(lanes):
            given = addresses[chosen]
            self.memory.written += self.memory.traffic(
                given, np.dtype(dtype).itemsize * len(values), self.threads.warp[lanes]
            )
            self.memory.store(given, _stacked(values, len(addresses), dtype)[chosen])

    def load_shared(self, addresses: Array, size: int, dtype: Any, mask: Array | None, I: Any) -> Array:  # noqa: E741
        chosen, lanes = self._chosen(mask, I)
        if not len(lanes):
            return np.zeros((size // np.dtype(dtype).itemsize, len(addresses)), dtype)
        blocks = self.threads.block[lanes]
        return self._spread(
            self.shared.load(addresses[chosen], blocks, size, dtype, self.threads.warp[lanes]), chosen, len(addresses)
        )

    def store_shared(self, addresses: Array, values: list[Array], dtype: Any, mask: Array | None, I: Any) -> None:  # noqa: E741
        chosen, lanes = self._chosen(mask, I)
        if len(lanes):
            stacked = _stacked(values, len(addresses), dtype)[chosen]
            self.shared.store(addresses[chosen], self.threads.block[lanes], stacked, lanes)

    def peer_address(self, addresses: Array, ranks: Array, I: Any) -> Array:  # noqa: E741
        return self.meeting.peer_address(addresses, np.broadcast_to(ranks, len(addresses)))

    def load_peer(self, addresses: Array, size: int, dtype: Any, mask: Array | None, I: Any) -> Array:  # noqa: E741
        chosen, lanes = self._chosen(mask, I)
        if not len(lanes):
            return np.zeros((size // np.dtype(dtype).itemsize, len(addresses)), dtype)
        return self._spread(self.meeting.load_peer(addresses[chosen], lanes, size, dtype), chosen, len(addresses))

    def whole_warps(self, I: Any) -> None:  # noqa: E741
        self.threads.whole(self.threads.lanes[I], "a warp barrier")

    def shuffle(
        self,
        mode: str,
        values: Array,
        by: Array,
        clamp: Array,
        members: Array,
        mask: Array | None,
        I: Any,  # noqa: E741
    ) -> tuple[Array, Array]:
        if mask is not None or (members != 0xFFFFFFFF).any():
            raise Fault("a shuffle among a part of a warp")
        lanes = self.threads.lanes[I]
        self.threads.whole(lanes, "a shuffle")
        lane = lanes % WARP
        by, clamp = (np.asarray(given).astype(np.int64) for given in (by, clamp))
        segment, bound = (clamp >> 8) & 31, clamp & 31
        lowest = lane & segment
        highest = lowest | (bound & ~segment)
        if mode == "up":
            source = lane - (by & 31)
            good = source >= highest
        else:
            if mode == "idx":
                source = lowest | ((by & 31) & ~segment)
            else:
                source = lane + (by & 31) if mode == "down" else lane ^ (by & 31)
            good = source <= highest
        source = np.where(good, source, lane)
        rows = np.arange(len(lanes)) - lane
        return values[rows + source], np.broadcast_to(good, len(lanes))

    def reduce(self, function: np.ufunc, values: Array, members: Array, I: Any) -> Array:  # noqa: E741
        if (members != 0xFFFFFFFF).any():
            raise Fault("a reduction among a part of a warp")
        self.threads.whole(self.threads.lanes[I], "a reduction")
        return np.repeat(function.reduce(values.reshape(-1, WARP), axis=1).astype(values.dtype), WARP)

    def each(self, mask: Array | None, I: Any, *given: Array) -> list[tuple[int, ...]]:  # noqa: E741
        """Lane by lane: block, lane and operands."""
        chosen, lanes = self._chosen(mask, I)
        count = len(self.threads.lanes[I])
        columns = [np.broadcast_to(part, count)[chosen].tolist() for part in given]
        return list(zip(self.threads.block[lanes].tolist(), lanes.tolist(), *columns, strict=True))

    def mbarrier_init(self, addresses: Array, counts: Array, mask: Array | None, I: Any) -> None:  # noqa: E741
        for block, lane, address, count in self.each(mask, I, addresses, counts):
            self.engine.init(block, address, count, lane)

    def mbarrier_invalidate(self, addresses: Array, mask: Array | None, I: Any) -> None:  # noqa: E741
        for block, _, address in self.each(mask, I, addresses):
            self.engine.invalidate(block, address)

    def mbarrier_arrive(self, addresses: Array, counts: Array, sizes: Array, mask: Array | None, I: Any) -> None:  # noqa: E741
        for block, _, address, count, size in self.each(mask, I, addresses, counts, sizes):
            self.engine.arrive(block, address, count, size)
        self.meeting.wake_at_mbarriers()

    def bulk_copy(
        self,
        targets: Array,
        sources: Array,
        sizes: Array,
        barriers: Array,
        mask: Array | None,
        I: Any,  # noqa: E741
    ) -> None:
        for block, _, target, source, size, barrier in self.each(mask, I, targets, sources, sizes, barriers):
            self.engine.start(block, target, source, size, barrier)

    def fence_proxy(self, I: Any) -> None:  # noqa: E741
        lanes = self.threads.lanes[I]
        for block in np.unique(self.threads.block[lanes]):
            self.shared.fence(int(block), lanes[self.threads.block[lanes] == block])

    def copy(self, targets: Array, sources: Array, size: int, taken: Array, mask: Array | None, I: Any) -> None:  # noqa: E741
        chosen, lanes = self._chosen(mask, I)
        if len(lanes):
            taken = np.broadcast_to(taken, len(targets))
            blocks = self.threads.block[lanes]
            self.engine.copy(lanes, blocks, targets[chosen], sources[chosen], size, taken[chosen].astype(np.int64))

    def commit_copies(self, I: Any) -> None:  # noqa: E741
        self.engine.commit(self.threads.lanes[I])

    def wait_for_copies(self, newest: int | None, I: Any) -> None:  # noqa: E741
        self.engine.wait(self.threads.lanes[I], newest)

    def trap(self, mask: Array | None, I: Any) -> None:  # noqa: E741
        if mask is None or mask.any():
            raise Fault("a trap")

    def multiply(
        self,
        columns: int,
        kind: str,
        slots: list[int],
        before: list[Array],
        first: Array,
        second: Array,
        add: Array,
        turned: tuple[bool, bool],
        I: Any,  # noqa: E741
    ) -> list[Array]:
        return self.products.multiply(columns, kind, slots, before, first, second, add, turned, self.threads.lanes[I])

    def commit_products(self, I: Any) -> None:  # noqa: E741
        self.products.commit(self.threads.lanes[I])

    def wait_for_products(self, newest: int, I: Any) -> None:  # noqa: E741
        self.products.wait(self.threads.lanes[I], newest)

    def load_matrices(self, addresses: Array, count: int, turned: bool, I: Any) -> list[Array]:  # noqa: E741
        lanes = self.threads.lanes[I]
        self.threads.whole(lanes, "ldmatrix")
        return matrices.load(self.shared, addresses, self.threads.block[lanes], self.threads.warp[lanes], count, turned)

    def store_matrices(self, addresses: Array, values: list[Array], turned: bool, I: Any) -> None:  # noqa: E741
        lanes = self.threads.lanes[I]
        self.threads.whole(lanes, "stmatrix")
        matrices.store(self.shared, addresses, self.threads.block[lanes], lanes, values, turned)


def _stacked(values: list[Array], count: int, dtype: Any) -> Array:
    """(lanes, count of numbers)"""
    result = np.empty((count, len(values)), dtype)
    for number, value in enumerate(values):
        result[:, number] = value
    return result
