"""Products of the tensor cores of sm_90: wgmma, of two factors in shared memory that descriptors tell the layout of.

Four warps multiply (64, 16) by (16, N); each holds 16 rows of the result, so that a warp is computed for itself. The
result comes when it is waited for: until then its registers are NaN, and the factors must stay as they are.

A descriptor holds the address and two strides in units of 16 bytes, and a swizzle, of which the kernels use the one
over 128 bytes: bits 4 to 6 of an address are those bits XOR bits 7 to 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.numerics import from_bf16
from tests.kernels.ptx.shared import BASE, Shared
from tests.kernels.ptx.threads import WARP, Threads

__all__ = ["Products"]

Array = npt.NDArray[Any]
DEPTH = 16


class Descriptor(NamedTuple):
    start: int
    leading: int
    stride: int

    @classmethod
    def of(cls, bits: int) -> Descriptor:
        if bits >> 62 != 1 or bits >> 49 & 7:
            raise Fault("a matrix descriptor of a layout that the machine does not know")
        return cls(*(16 * (bits >> shift & 0x3FFF) for shift in (0, 16, 32)))

    def offsets(self, outer: Array, inner: Array, turned: bool) -> Array:
        """Of elements of 16 bits in shared memory; ``inner`` counts along the sum."""
        if turned:
            # 64 neighbours of the outer dimension in a row of 128 bytes, 8 rows in a piece
            plain = 2 * (outer % 64) + outer // 64 * self.leading + 128 * (inner % 8) + inner // 8 * self.stride
        else:
            plain = 2 * inner + 128 * (outer % 8) + outer // 8 * self.stride
        found = self.start + plain
        return (found ^ ((found >> 7 & 7) << 4)) - BASE


@dataclass
class Waiting:
    """Sums that are under way, of the registers that begin with one slot."""

    slots: list[int]
    sums: Array  # (registers, lanes)
    active: Array  # (lanes,)
    group: Array  # (lanes,)


class Reading(NamedTuple):
    """Bytes of shared memory that a product reads until it is done."""

    lane: int
    group: int
    places: Array
    bytes: Array


class Products:
    """
    Args:
        registers: the register file, into which results are put.
    """

    def __init__(self, threads: Threads, shared: Shared, registers: list[Any]) -> None:
        self.threads, self.shared, self.registers = threads, shared, registers
        self.committed = np.zeros(threads.count, np.int64)
        self.waiting: dict[int, Waiting] = {}
        self.readings: list[Reading] = []

    def _factor(self, bits: int, lane: int, outer: Array, turned: bool, kind: str) -> Array:
        """(outer, DEPTH) in float64."""
        block, warp = int(self.threads.block[lane]), int(self.threads.warp[lane])
        offsets = Descriptor.of(bits).offsets(outer[:, None], np.arange(DEPTH), turned)
        flat = offsets.reshape(-1)
        if (flat < 0).any() or (flat + 2 > self.shared.size).any():
            raise Fault("a factor of a product out of bounds in shared memory")
        places = flat + block * self.shared.pitch
        assert self.shared.writers is not None
        if (self.shared.writers[places] != -1).any():
            raise Fault("a product of what threads wrote, without a fence.proxy.async between")
        blocks, warps = np.full(len(places), block), np.full(len(places), warp)
        grain = self.shared.races.grain
        self.shared.races.reading(places // grain * grain, max(grain, 2), blocks, warps)
        found = self.shared.bytes.view(np.uint16)[places // 2]
        self.readings.append(Reading(lane, int(self.committed[lane]), places // 2, found))
        values = from_bf16(found) if kind == "bf16" else found.view(np.float16)
        return values.astype(np.float64).reshape(offsets.shape)

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
        lanes: Array,
    ) -> list[Array]:
        """Start sum += first @ second; returns what the registers hold meanwhile.

        Args:
            slots, before: registers of the sum, and what they hold.
            first, second: descriptors.
            add: false where the sum begins with this product.
            turned: which of the factors lie with the sum's dimension outside.
        """
        self.threads.whole(lanes, "a product")
        held = self.waiting.get(slots[0])
        if held is None:
            count = self.threads.count
            sums = np.zeros((len(slots), count), np.float32)
            held = Waiting(slots, sums, np.zeros(count, bool), np.zeros(count, np.int64))
            self.waiting[slots[0]] = held
        found = np.where(held.active[lanes], held.sums[:, lanes], np.stack(before))
        found[:, ~np.broadcast_to(add, len(lanes))] = 0.0
        number = np.arange(len(slots))
        for begin in range(0, len(lanes), WARP):
            warp = slice(begin, begin + WARP)
            lane = int(lanes[begin])
            quarter = int(self.threads.warp[lane] % (self.threads.size // WARP)) % 4
            a = self._factor(int(first[begin]), lane, 16 * quarter + np.arange(16), turned[0], kind)
            b = self._factor(int(second[begin]), lane, np.arange(columns), turned[1], kind)
            result = a @ b.T  # (16, columns)
            place = np.arange(WARP)
            rows = place // 4 + 8 * (number[:, None] // 2 % 2)
            found[:, warp] += result[rows, 8 * (number[:, None] // 4) + 2 * (place % 4) + number[:, None] % 2]
        held.sums[:, lanes] = found
        held.active[lanes] = True
        held.group[lanes] = self.committed[lanes]
        return [np.full(len(lanes), np.nan, np.float32)] * len(slots)

    def commit(self, lanes: Array) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: Array, newest: int) -> None:
        """For all groups of these threads but the newest."""
        mine = np.zeros(self.threads.count, bool)
        mine[lanes] = True
        over = self.committed - newest
        for held in self.waiting.values():
            due = np.flatnonzero(mine & held.active & (held.group < over))
            for slot, values in zip(held.slots, held.sums, strict=True):
                if self.registers[slot] is not None:
                    self.registers[slot][due] = values[due].view(np.uint32)
            held.active[due] = False
        left = []
        for reading in self.readings:
            if not (mine[reading.lane] and reading.group < over[reading.lane]):
                left.append(reading)
            elif (self.shared.bytes.view(np.uint16)[reading.places] != reading.bytes).any():
                raise Fault("a factor was overwritten while its product was under way")
        self.readings = left
