"""The memory of a route, from shapes alone: what is alive at each stage of a forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_po.ops.gradients import storage_dtype
from fused_po.ops.routes import Route
from fused_po.ops.shapes import tile_bytes
from fused_po.ops.workspace import padded

__all__ = ["Peak", "peak"]


@dataclass(frozen=True)
class Peak:
    """Bytes beyond the inputs at the fullest stage.

    Attributes:
        gradients: those that are returned and made by then.
        accumulator: of gradients in a wider dtype than they are returned in.
        scratch: tiles, products and copies.
    """

    gradients: int
    accumulator: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.accumulator + self.scratch


def peak(route: Route, tokens: int, *, fused: bool, plain: bool, widens: bool) -> Peak:
    """The fullest stage of a call.

    Args:
        route: of the call.
        tokens: N, all of which carry loss.
        fused: of ``linear_loss``, whose horizons fit a chunk; else of ``linear_token_stats``.
        plain: gradients come through logp only.
        widens: products widen their operands, as on a CPU in half precision.
    """
    stages = _eager(route, tokens, fused, plain) if route.eager else _kept(route, tokens, fused)
    sizes = route.sizes
    cast = 2 * min(sizes.scratch // 8, 4 * sizes.vocab * max(sizes.hidden, route.tile)) if widens else 0
    copy = sizes.copied if sizes.wanted.any and not widens else 0
    fullest = max(stages, key=lambda stage: stage.total)
    return Peak(fullest.gradients, fullest.accumulator, fullest.scratch + cast + copy)


def _kept(route: Route, tokens: int, fused: bool) -> list[Peak]:
    sizes = route.sizes
    wide, narrow, hidden = sizes.wide, sizes.narrow, sizes.hidden
    row, logits = padded(sizes.vocab, sizes.compute) * narrow, _logits(route)
    flight = 0 if route.in_place else min(route.tile, tokens) * logits
    products = min(route.product_rows, tokens) * hidden * wide
    operand = hidden * narrow * (3 if narrow < wide else 1) if sizes.wanted.head else 0
    d_hidden, d_weight = _hidden(route, tokens, narrow), sizes.returned
    wide_hidden = _hidden(route, tokens, storage_dtype(sizes.compute).itemsize) if fused else d_hidden
    several = fused and route.several(tokens)
    chunk = min(tokens, route.chunk_rows(tokens)) if fused else tokens
    kept = route.keeps(chunk, several)
    area = tile_bytes(sizes, *route.shape(chunk - kept)) if chunk > kept else 0
    forward = kept * row + max(flight, area)
    backward = kept * (row + operand) + max(products, area)
    blocks = -(-(chunk - kept) // max(1, route.shape(chunk - kept)[0])) if chunk > kept else 0
    accumulates = several or route.wide or blocks > 1
    wide_weight = sizes.accumulator if accumulates else 0
    made = 0 if wide_weight else d_weight
    if several:
        held = wide_weight + (wide_hidden - d_hidden)
        return [
            Peak(d_hidden + made, held, max(forward, backward)),
            Peak(d_hidden + d_weight, held, 0),
        ]
    return [
        Peak(0, 0, forward),
        Peak(d_hidden + made, wide_weight + (wide_hidden - d_hidden), backward),
        Peak(d_hidden + d_weight, wide_weight + (wide_hidden - d_hidden), 0 if fused else kept * row),
    ]


def _eager(route: Route, tokens: int, fused: bool, plain: bool) -> list[Peak]:
    sizes = route.sizes
    wide, narrow, hidden = sizes.wide, sizes.narrow, sizes.hidden
    rows = min(route.tile, tokens)
    flight = rows * (_logits(route) + (0 if route.in_place else padded(sizes.vocab, sizes.compute) * narrow))
    flight += rows * hidden * (wide + narrow)
    d_hidden = _hidden(route, tokens, narrow)
    stored = _hidden(route, tokens, storage_dtype(sizes.compute).itemsize)
    if fused:
        home = tokens * hidden * wide if tokens <= route.whole else 0
        placed = 0 if home else d_hidden
        return [
            Peak(placed, stored - d_hidden if placed else 0, home + flight),
            Peak(d_hidden, stored - d_hidden, home),
        ]
    again = 0 if plain else tile_bytes(sizes, *route.shape(tokens))
    return [Peak(0, 0, stored + flight), Peak(d_hidden, 0, stored + again + route.product_rows * hidden * wide)]


def _logits(route: Route) -> int:
    wide = torch.float64 if route.sizes.compute == torch.float64 else torch.float32
    return padded(route.sizes.vocab, wide) * wide.itemsize


def _hidden(route: Route, tokens: int, itemsize: int) -> int:
    return tokens * route.sizes.hidden * itemsize if route.sizes.wanted.hidden else 0
