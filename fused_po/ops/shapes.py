"""Sizes of two-dimensional tiles: rows times a slice of the vocabulary, within so many bytes."""

from __future__ import annotations

import math

from fused_po.ops.sizes import Sizes

__all__ = ["GRAIN", "fit", "grained", "tile_bytes", "tile_columns", "tile_square"]

# products are fastest where rows and columns come in such numbers
GRAIN = 128
# columns of the narrowest tile, whatever the budget: of single logits all time goes into calls
FEWEST_COLUMNS = 16


def tile_square(sizes: Sizes, area: int) -> tuple[int, int]:
    """Rows and columns of a tile of so many bytes, as near to a square as the vocabulary allows."""
    element, row, column = _bytes(sizes)
    side = (math.sqrt((row + column) ** 2 + 4 * element * area) - row - column) / (2 * element)
    # a grain of columns at least, where what goes with them leaves room for rows
    least = GRAIN if GRAIN * column <= area // 2 else FEWEST_COLUMNS
    columns = min(sizes.vocab, grained(max(least, int(side))))
    return grained(fit(area - columns * column, columns * element + row)), columns


def tile_columns(sizes: Sizes, area: int, rows: int) -> int:
    """Columns of a tile of so many rows; below 1 where there is no room."""
    element, row, column = _bytes(sizes)
    return min(sizes.vocab, grained((area - rows * row) // (rows * element + column)))


def tile_bytes(sizes: Sizes, rows: int, columns: int) -> int:
    """Of a tile and what goes with it."""
    element, row, column = _bytes(sizes)
    return rows * columns * element + rows * row + columns * column


def _bytes(sizes: Sizes) -> tuple[int, int, int]:
    """Of an element, and of what goes with a row and with a column."""
    wide, narrow, hidden = sizes.wide, sizes.narrow, sizes.hidden
    # logits and, where it is a buffer of its own, their gradient
    element = wide if wide == narrow else wide + narrow
    if not sizes.wanted.any:
        return wide, hidden * narrow, hidden * narrow
    # hidden states, as they are and times their coefficient, and the product; the weight, cast, and a slice of dW
    return element, hidden * (2 * narrow + wide), hidden * (narrow + wide)


def fit(room: int, each: int) -> int:
    """How many of ``each`` bytes; one at least."""
    return max(1, room // max(1, each))


def grained(count: int) -> int:
    """In whole grains, where it is one at least."""
    return count if count < GRAIN else count // GRAIN * GRAIN
