"""Matrices of 8 by 8 elements of 16 bits that a warp reads and writes together: ldmatrix and stmatrix.

Lane 8 j + r gives the address of row r of matrix j. A lane holds two neighbours of a row of each: lane l those at
columns 2 (l % 4) and 2 (l % 4) + 1 of row l // 4; turned, of the transposed matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.shared import Shared

__all__ = ["load", "store"]

Array = npt.NDArray[Any]
WARP = 32


def _givers(lanes: int, count: int) -> Array:
    """Which lanes give the addresses of rows, (warps * count * 8,)."""
    return (np.arange(0, lanes, WARP)[:, None] + np.arange(8 * count)).reshape(-1)


def load(shared: Shared, addresses: Array, blocks: Array, warps: Array, count: int, turned: bool) -> list[Array]:
    givers = _givers(len(addresses), count)
    rows = shared.load(addresses[givers], blocks[givers], 16, np.uint16, warps[givers]).reshape(-1, count, 8, 8)
    rows = np.ascontiguousarray(rows.swapaxes(2, 3) if turned else rows)
    words = rows.view(np.uint32).reshape(-1, count, WARP)
    return [np.ascontiguousarray(words[:, number]).reshape(-1) for number in range(count)]


def store(shared: Shared, addresses: Array, blocks: Array, lanes: Array, values: list[Array], turned: bool) -> None:
    count = len(values)
    givers = _givers(len(addresses), count)
    words = np.stack([value.reshape(-1, WARP) for value in values], 1)
    rows = words.view(np.uint16).reshape(-1, count, 8, 8)
    rows = np.ascontiguousarray(rows.swapaxes(2, 3) if turned else rows).reshape(-1, 8)
    shared.store(addresses[givers], blocks[givers], rows, lanes[givers])
