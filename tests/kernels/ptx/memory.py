"""Global memory: what a launch was given, by address; an access to anything else is a fault."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Fault", "Global", "Region", "region_of"]

Array = npt.NDArray[Any]
# a vector has 32 bytes at most; bulk copies are made of 16
PIECE = 32


class Fault(RuntimeError):
    """What a GPU would answer with an error, with garbage or not at all."""


@dataclass
class Region:
    """``rows`` pieces of memory, ``stride`` bytes apart.

    Attributes:
        base: address of the first row.
        readable: bytes of each row that may be read.
        writable: bytes of each row that may be written.
        kept: rows whose bytes exist, where a region is larger than the memory of this machine; an access to another
            one is a fault.
        bytes: those of the kept rows, from ``origin`` on.
    """

    name: str
    base: int
    rows: int
    readable: int
    writable: int
    stride: int
    kept: range = range(0)
    bytes: Array = field(default_factory=lambda: np.empty(0, np.uint8))

    def __post_init__(self) -> None:
        self.kept = self.kept or range(self.rows)
        self.begin = self.base + self.kept.start * self.stride
        self.end = self.base + (self.kept.stop - 1) * self.stride + max(self.readable, self.writable)
        # accesses are aligned, and views of the bytes must be so too
        self.origin = self.begin - self.begin % PIECE
        size = self.end - self.origin
        self.bytes = np.zeros(size + -size % PIECE, np.uint8)

    def rows_at(self, start: int, length: int) -> Array:
        """The first bytes of each kept row, (rows, length), as a view."""
        first = self.begin - self.origin
        shape, strides = (len(self.kept), length), (self.stride, 1)
        return np.lib.stride_tricks.as_strided(self.bytes[first + start :], shape, strides)

    def may(self, addresses: Array, size: int, write: bool) -> bool:
        """Whether all of these lie within one row each."""
        offsets = addresses - np.uint64(self.base)
        limit = self.writable if write else self.readable
        if self.rows == 1:
            return bool((offsets + np.uint64(size) <= np.uint64(limit)).all())
        row = np.minimum(offsets // np.uint64(max(self.stride, 1)), np.uint64(self.rows - 1))
        return bool((offsets - row * np.uint64(self.stride) + np.uint64(size) <= np.uint64(limit)).all())


def region_of(
    name: str,
    tensor: Tensor,
    *,
    columns: int | None = None,
    written: int = 0,
    address: int | None = None,
    rows: int | None = None,
) -> Region:
    """The memory of a tensor, with its contents.

    Args:
        columns: of each row that may be read, for a matrix; None stands for all of a tensor without gaps.
        written: columns that may be written.
        address: where it is to lie; None takes that of the tensor. The lowest 4 bits must be the same.
        rows: of a matrix whose last rows are those of the tensor.
    """
    size = tensor.element_size()
    address = tensor.data_ptr() if address is None else address
    if columns is None:
        assert tensor.is_contiguous()
        length = tensor.numel() * size
        region = Region(name, address, 1, length, length if written else 0, length)
    else:
        count = tensor.shape[0]
        total = count if rows is None else rows
        stride = tensor.stride(0) * size
        region = Region(name, address, total, columns * size, written * size, stride, range(total - count, total))
    source, target = _view(tensor, region), region.rows_at(0, max(region.readable, region.writable))
    target[...] = source
    return region


def put_back(region: Region, tensor: Tensor) -> None:
    """What was written into a region, into the tensor."""
    _view(tensor, region)[:, : region.writable] = region.rows_at(0, region.writable)


def _view(tensor: Tensor, region: Region) -> Array:
    """The bytes of a tensor that a region stands for."""
    length, count = max(region.readable, region.writable), len(region.kept)
    total = (count - 1) * region.stride + length
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * total).from_address(tensor.data_ptr()))
    return np.lib.stride_tricks.as_strided(raw, (count, length), (region.stride, 1))


class Global:
    """All regions of a launch, and the bytes that were read and written.

    Neighbours of a warp that read the same place count once.
    """

    def __init__(self, regions: list[Region]) -> None:
        # what may be written comes first: in place, the same memory has two names
        self.regions = sorted(regions, key=lambda region: -region.writable)
        self.read = self.written = 0

    def _find(self, addresses: Array, size: int, write: bool) -> Region | None:
        low, high = int(addresses.min()), int(addresses.max()) + size
        for region in self.regions:
            if region.begin <= low and high <= region.end and region.may(addresses, size, write):
                return region
        return None

    def _parts(self, addresses: Array, size: int, write: bool) -> list[tuple[Region, Any]]:
        """Regions, and which of the addresses lie in each."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"a misaligned access of {size} bytes to global memory")
        found = self._find(addresses, size, write)
        if found is not None:
            return [(found, slice(None))]
        parts: list[tuple[Region, Any]] = []
        left = np.ones(len(addresses), bool)
        for region in self.regions:
            inside = left & (addresses >= np.uint64(region.begin)) & (addresses < np.uint64(region.end))
            if inside.any() and region.may(addresses[inside], size, write):
                parts.append((region, np.flatnonzero(inside)))
                left &= ~inside
        if left.any():
            wrong = int(addresses[left][0])
            near = [f"{region.name}{wrong - region.base:+}" for region in self.regions]
            what = "write" if write else "read"
            raise Fault(f"a {what} out of bounds in global memory at {wrong:#x}, {size} bytes ({', '.join(near)})")
        return parts

    def load(self, addresses: Array, size: int, dtype: Any) -> Array:
        """(n, size / itemsize) numbers at n addresses."""
        count = size // np.dtype(dtype).itemsize
        result = np.empty((len(addresses), count), dtype)
        for region, chosen in self._parts(addresses, size, False):
            index = (addresses[chosen] - np.uint64(region.origin)).astype(np.int64) // size
            whole = len(region.bytes) // size * size
            result[chosen] = region.bytes[:whole].view(dtype).reshape(-1, count)[index]
        return result

    def store(self, addresses: Array, values: Array) -> None:
        """Values (n, count) at n addresses."""
        size, count = values.dtype.itemsize * values.shape[1], values.shape[1]
        for region, chosen in self._parts(addresses, size, True):
            index = (addresses[chosen] - np.uint64(region.origin)).astype(np.int64) // size
            whole = len(region.bytes) // size * size
            region.bytes[:whole].view(values.dtype).reshape(-1, count)[index] = values[chosen]

    @staticmethod
    def traffic(addresses: Array, size: int, warps: Array) -> int:
        """Bytes that an access of some threads moves."""
        new = (addresses[1:] != addresses[:-1]) | (warps[1:] != warps[:-1])
        return size * (1 + int(np.count_nonzero(new)))

    def copy_out(self, address: int, size: int) -> Array:
        """The bytes that a bulk copy takes, counted."""
        self.read += size
        pieces = address + np.arange(0, size, 16, dtype=np.uint64)
        return self.load(pieces, 16, np.uint8).reshape(-1)
