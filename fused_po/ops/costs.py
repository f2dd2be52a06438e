"""What the alternatives of a route cost on paper, by which the planner chooses between them.

The prices are those of one device whatever the call runs on, so that every rank and every machine takes the same route.
"""

from __future__ import annotations

from fused_po.ops.shapes import tile_square
from fused_po.ops.sizes import Sizes
from fused_po.prices import device

__all__ = ["chunk_seconds", "recompute_seconds"]

PRICES = device("h200")


def accumulating(sizes: Sizes) -> float:
    """Seconds to read all of dW and write it again."""
    return PRICES.moved(2 * sizes.vocab * sizes.hidden * sizes.wide)


def chunk_seconds(sizes: Sizes, rows: int) -> float:
    """Seconds a row of adding to dW once for so many rows."""
    return accumulating(sizes) / rows


def recompute_seconds(sizes: Sizes, area: int) -> float:
    """Seconds a row of making logits again, in two-dimensional tiles of so many bytes."""
    block, columns = tile_square(sizes, area)
    flops = 2 * sizes.vocab * sizes.hidden
    logits = sizes.vocab * sizes.wide
    slices = -(-sizes.vocab // columns)
    # written and read once more, and the product of GEMM 2 is read and written for each slice
    moved = 2 * logits + 2 * (slices - 1) * sizes.hidden * sizes.wide
    return flops / PRICES.rate(sizes.compute) + PRICES.moved(moved) + accumulating(sizes) / block
