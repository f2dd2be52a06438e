"""What parts of a route cost on paper.

The prices are those of one device whatever the call runs on, so that every rank and every machine takes the same route.
"""

from __future__ import annotations

from fused_po.ops.shapes import tile_square
from fused_po.ops.sizes import Sizes
from fused_po.prices import Device, device

__all__ = ["PRICES", "accumulating", "chunk_seconds", "recompute_seconds"]

PRICES = device("h200")


def accumulating(sizes: Sizes, prices: Device = PRICES) -> float:
    """Seconds to read all of dW and write it again."""
    return prices.moved(2 * sizes.vocab * sizes.hidden * sizes.wide)


def chunk_seconds(sizes: Sizes, rows: int) -> float:
    """Seconds a row of adding to dW once for so many rows."""
    return accumulating(sizes) / rows


def recompute_seconds(sizes: Sizes, area: int) -> float:
    """Seconds a row of making logits again, in two-dimensional tiles of so many bytes."""
    block, columns = tile_square(sizes, area)
    slices = -(-sizes.vocab // columns)
    # written and read once more, and the product of GEMM 2 is read and written for each slice
    moved = 2 * sizes.vocab * sizes.wide + 2 * (slices - 1) * sizes.hidden * sizes.wide
    again = 2 * sizes.vocab * sizes.hidden / PRICES.rate(sizes.compute) + PRICES.moved(moved)
    return again + accumulating(sizes) / block
