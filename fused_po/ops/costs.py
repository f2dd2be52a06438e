"""What a route costs on paper, item by item: the planner chooses by the sum, ``Plan.explain`` lists the items.

The prices are those of one device whatever the call runs on, so that every rank and every machine takes the same route.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fused_po.ops.shapes import tile_square
from fused_po.ops.sizes import Sizes
from fused_po.prices import Device, device

if TYPE_CHECKING:
    from fused_po.ops.routes import Route

__all__ = ["PRICES", "chunk_seconds", "recompute_seconds", "route_seconds"]

PRICES = device("h200")


def route_seconds(route: Route, rows: int, *, fused: bool, on: Device | None = None) -> dict[str, float]:
    """Seconds by item of a forward and backward of so many rows, with gradients through logp only.

    Args:
        route: of the call.
        rows: N.
        fused: of ``linear_loss``, with horizons that fit a chunk; else of ``linear_token_stats``.
        on: whose prices; default those that routes are chosen by.
    """
    prices = PRICES if on is None else on
    sizes = route.sizes
    wanted, elements, head = sizes.wanted, rows * sizes.vocab, sizes.vocab * sizes.hidden
    product = 2 * elements * sizes.hidden / prices.rate(sizes.compute)
    chunk = min(rows, route.chunk_rows(rows)) if fused and not route.eager else rows
    several = fused and route.several(rows)
    kept = rows if route.eager or several or not wanted.any else route.keeps(rows, False)
    again = rows - kept if wanted.any else 0
    block, columns = route.shape(again)
    blocks, slices = -(-again // block), -(-sizes.vocab // columns)
    accumulates = wanted.weight and (several or route.wide or blocks > 1)
    rounds = accumulates and sizes.accumulator > 0
    added = (-(-rows // chunk) if several else 1 + (blocks if kept else blocks - 1) if again else 1) - 1
    again_scaled = accumulating(sizes, prices) * added if sizes.compute == torch.float16 and several else 0.0
    tiles = prices.moved(elements * sizes.wide) + (prices.moved(kept * sizes.vocab * sizes.narrow) if wanted.any else 0)
    return {
        "the products": product * (1 + wanted.hidden + wanted.weight),
        "logits read, their gradient written": tiles,
        "logits made again, read and their gradient written": product * again / max(1, rows)
        + prices.moved(again * sizes.vocab * (sizes.wide + sizes.narrow)),
        "dW read and written again": prices.moved(2 * head * sizes.wide) * added if wanted.weight else 0.0,
        "dH read and written again": prices.moved(2 * again * sizes.hidden * sizes.wide) * (slices - 1),
        "the weight cast": prices.moved(head * (sizes.stored.itemsize + sizes.narrow)) if sizes.copied else 0.0,
        # where coefficients grow from chunk to chunk; else a look at a number
        "dW brought to another scale": again_scaled,
        "dW rounded": prices.moved(head * (sizes.wide + sizes.stored.itemsize)) if rounds else 0.0,
        "dW scaled": prices.moved(2 * sizes.returned) if fused and not rounds and rows > route.waiting else 0.0,
    }


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
