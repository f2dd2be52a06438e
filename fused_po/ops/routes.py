"""How a call goes through its head: what rows keep from forward to backward, and the sizes of tiles.

Everything follows from the shapes, the dtypes, what is wanted and the budget, so that ranks take equal steps: never
from free memory, a measurement or the name of a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fused_po.kernels.contract import accumulation_dtype
from fused_po.ops.costs import PRICES, accumulating, chunk_seconds, recompute_seconds
from fused_po.ops.shapes import GRAIN, fit, grained, tile_bytes, tile_columns, tile_square
from fused_po.ops.sizes import Sizes
from fused_po.ops.workspace import padded
from fused_po.prices import Device

__all__ = ["Route"]

# enough for a product to run at full rate
MOST_TILE_ROWS = 1024
ENDLESS = 1 << 62


@dataclass(frozen=True)
class Route:
    """Rows at a time.

    The memory that a call spends beyond inputs, outputs and gradients is ``scratch_bytes`` and, where the head is
    trained and its weight is narrower than float32, the room of one dW in float32 (4 V H bytes): as an accumulator, or
    for gradient tiles that make one unnecessary. A gradient that is returned and not made yet leaves its own room free.
    Beside that is one copy of the weight where that is stored wider than products take it.

    Attributes:
        sizes: of the call.
        tile: rows whose logits are made at a time, as a whole.
        product_rows: rows of GEMM 2 at a time.
        area: bytes for two-dimensional tiles and what goes with them.
        alone: rows of a call in one chunk, which all keep their tile, so that each element of dW is written once.
        whole: rows that can all keep their tile in a chunk of several, each of which adds to dW.
        chunk: rows of a chunk of several: ``whole``, or without end where logits that are made again are cheaper.
        once: rows that keep their tile where the others make up one block.
        kept: rows that keep their tile where the others are more.
        waiting: rows of a call of ``linear_loss`` whose tiles are no larger than dW, so that GEMM 2 and 3 can wait for
            backward.
        in_place: a tile is as wide as logits, whose memory it takes.
        eager: the head is frozen and gradients come through logp only: GEMM 2 runs in the forward.
        hides_probabilities: gradients through more than logp need the logits.
        keeps_logits: rows keep those instead.
        remakes: tiles are made in backward, when rows have told nothing but statistics.
        wide: dW needs an accumulator whatever the length.
        drops: blocks of a row's gradient that are negligible are left out.
    """

    sizes: Sizes
    tile: int
    product_rows: int
    area: int
    alone: int
    whole: int
    chunk: int
    once: int = 0
    kept: int = 0
    waiting: int = 0
    in_place: bool = False
    eager: bool = False
    hides_probabilities: bool = False
    keeps_logits: bool = False
    remakes: bool = False
    wide: bool = False
    drops: bool = False

    def several(self, rows: int) -> bool:
        """A call of ``linear_loss`` of so many rows goes in more than one chunk, where its horizons allow it."""
        return not self.eager and self.chunk_rows(rows) < rows

    def keeps(self, count: int, several: bool) -> int:
        """How many of so many rows keep their tile; ``several``: they are a chunk of several."""
        if count <= (self.whole if several else self.alone):
            return count
        rest = count - self.once
        return self.once if not several and rest <= self.again(rest)[0] else self.kept

    def shape(self, rows: int) -> tuple[int, int]:
        """Rows and columns of two-dimensional tiles of so many rows.

        Between blocks of rows dW is read and written again, between slices of columns dH. Squares do least of both,
        but one block of all rows needs no accumulator of dW.
        """
        square, side = tile_square(self.sizes, self.area)
        if torch.compiler.is_compiling() or rows <= 0:
            # sizes that do not follow the length
            return square, side
        columns = tile_columns(self.sizes, self.area, rows)
        blocks = -(-rows // square)
        if columns >= GRAIN and rows / columns <= rows / side + (blocks - 1):
            return rows, columns
        return square, side

    def again(self, rows: int) -> tuple[int, int]:
        """The same for gradients: where blocks are left out, of whole rows, whose share of a slice says nothing."""
        if not self.drops:
            return self.shape(rows)
        # an accumulator of dW is there anyway
        each = tile_bytes(self.sizes, 1, self.sizes.vocab) - tile_bytes(self.sizes, 0, self.sizes.vocab)
        return grained(fit(self.area, each)), self.sizes.vocab

    def chunk_rows(self, count: int) -> int:
        """Rows of a chunk of a call of so many: all, or equal chunks."""
        if count <= self.alone:
            return max(1, count)
        if torch.compiler.is_compiling() or count <= self.chunk:
            return self.chunk
        each = -(-count // -(-count // self.chunk))
        return min(self.chunk, each if each < GRAIN else -(-each // GRAIN) * GRAIN)

    def seconds(self, rows: int, *, fused: bool, on: Device = PRICES) -> dict[str, float]:
        """Seconds on paper, by item, of a forward and backward of so many rows, with gradients through logp only.

        Routes are chosen by their sum; ``Plan.explain`` lists them.

        Args:
            rows: N.
            fused: of ``linear_loss``, with horizons that fit a chunk; else of ``linear_token_stats``.
            on: whose prices; default those that routes are chosen by.
        """
        sizes = self.sizes
        wanted, elements, head = sizes.wanted, rows * sizes.vocab, sizes.vocab * sizes.hidden
        product = 2 * elements * sizes.hidden / on.rate(sizes.compute)
        chunk = min(rows, self.chunk_rows(rows)) if fused and not self.eager else rows
        several = fused and self.several(rows)
        kept = rows if self.eager or several or not wanted.any else self.keeps(rows, False)
        again = rows - kept if wanted.any else 0
        block, columns = self.shape(again)
        blocks, slices = -(-again // block), -(-sizes.vocab // columns)
        accumulates = wanted.weight and (several or self.wide or blocks > 1)
        rounds = accumulates and sizes.accumulator > 0
        added = (-(-rows // chunk) if several else 1 + (blocks if kept else blocks - 1) if again else 1) - 1
        again_scaled = accumulating(sizes, on) * added if sizes.compute == torch.float16 and several else 0.0
        tiles = on.moved(elements * sizes.wide) + (on.moved(kept * sizes.vocab * sizes.narrow) if wanted.any else 0)
        return {
            "the products": product * (1 + wanted.hidden + wanted.weight),
            "logits read, their gradient written": tiles,
            "logits made again, read and their gradient written": product * again / max(1, rows)
            + on.moved(again * sizes.vocab * (sizes.wide + sizes.narrow)),
            "dW read and written again": on.moved(2 * head * sizes.wide) * added if wanted.weight else 0.0,
            "dH read and written again": on.moved(2 * again * sizes.hidden * sizes.wide) * (slices - 1),
            "the weight cast": on.moved(head * (sizes.stored.itemsize + sizes.narrow)) if sizes.copied else 0.0,
            # where coefficients grow from chunk to chunk; else a look at a number
            "dW brought to another scale": again_scaled,
            "dW rounded": on.moved(head * (sizes.wide + sizes.stored.itemsize)) if rounds else 0.0,
            "dW scaled": on.moved(2 * sizes.returned) if fused and not rounds and rows > self.waiting else 0.0,
        }

    def recomputing(self) -> Route:
        """The same where nothing that waits is of use."""
        return replace(self, eager=False)

    @staticmethod
    def of(sizes: Sizes, rows: int, *, fused: bool, unscaled: bool, parts: bool = False) -> Route:
        """The cheapest route of a call.

        Args:
            sizes: of the call.
            rows: N.
            fused: the loss is known before backward, as in ``linear_loss``.
            unscaled: gradients come through logp only; of ``linear_token_stats`` that is not known before backward.
            parts: gradients of parts are wanted, each in an accumulator of its own.
        """
        # a trace takes no answers from elsewhere
        choose = _cheapest.__wrapped__ if torch.compiler.is_compiling() else _cheapest
        return choose(sizes, rows, fused, unscaled, parts)

    @staticmethod
    def _within(sizes: Sizes, area: int, *, fused: bool, unscaled: bool, parts: bool) -> Route:
        """The route whose two-dimensional tiles take so many bytes."""
        wanted, scratch, wide, narrow = sizes.wanted, sizes.scratch, sizes.wide, sizes.narrow
        in_place = wide == narrow
        logits_row = padded(sizes.vocab, accumulation_dtype(sizes.compute)) * wide
        product_rows = max(1, min(MOST_TILE_ROWS, scratch // 16 // max(1, sizes.hidden * wide)))
        if wanted.hidden and not wanted.head and (unscaled or not fused):
            return _eager(sizes, product_rows, area, logits_row)
        least = min(2 * GRAIN, scratch // 4 // logits_row)
        tile = grained(max(1, min(MOST_TILE_ROWS, max(scratch // 8 // logits_row, least))))
        # bytes that a row keeps, and its hidden state times its coefficient, the operand of GEMM 3
        row = padded(sizes.vocab, sizes.compute) * narrow
        full = row + (sizes.hidden * narrow if wanted.head else 0)
        flight = 0 if in_place else tile * logits_row
        products = product_rows * sizes.hidden * wide
        needs_accumulator = parts or sizes.drops or (fused and sizes.compute == torch.float16)
        own, returned = sizes.accumulator, sizes.returned
        # dW is not returned before the last chunk has added to it, and chunks are gone by then, but not the tiles that
        # wait for their coefficients, which autograd holds; the rest of its room is left for what fragments
        room = scratch + (returned * 2 // 3 if own and fused else 0)
        whole = fit(room - max(flight, products), full)
        alone = min(fit(scratch + own + returned - flight, row), fit(scratch + own - products, full))
        alone = whole if needs_accumulator else alone
        kept = max(0, room - max(flight, products, area)) // full
        once = kept if needs_accumulator else max(kept, (scratch + own - max(products, area)) // full)
        # chunks so small that adding to dW for each is dearer than making logits again are no chunks
        again = recompute_seconds(sizes, area) < chunk_seconds(sizes, whole)
        waits = fused and unscaled and wanted.head and not needs_accumulator
        return Route(
            sizes,
            tile,
            product_rows,
            area,
            alone,
            whole,
            ENDLESS if wanted.weight and again else whole,
            # what does not fit at once does not fit beside others
            min(once, alone),
            min(kept, once, alone),
            # into memory that is there already nothing is added before backward
            waiting=0 if not waits else alone if sizes.adds else min(alone, max(returned, 1) // row),
            in_place=in_place,
            hides_probabilities=sizes.hides,
            keeps_logits=fused and not unscaled and sizes.hides and in_place,
            remakes=fused and not unscaled and sizes.hides and not in_place,
            wide=needs_accumulator,
            drops=sizes.drops,
        )


@lru_cache(maxsize=1024)
def _cheapest(sizes: Sizes, rows: int, fused: bool, unscaled: bool, parts: bool) -> Route:
    options = {"fused": fused, "unscaled": unscaled, "parts": parts}
    if not sizes.wanted.any:
        return Route._within(sizes, sizes.scratch, **options)
    usual = Route._within(sizes, sizes.scratch // 4, **options)
    if torch.compiler.is_compiling() or usual.eager or rows <= max(usual.alone, usual.whole):
        # nothing is made again, or it must not follow the length
        return usual
    others = [Route._within(sizes, sizes.scratch * share // 16, **options) for share in range(2, 13)]
    return min((usual, *others), key=lambda route: sum(route.seconds(rows, fused=fused).values()))


def _eager(sizes: Sizes, product_rows: int, area: int, logits_row: int) -> Route:
    """Tiles are in flight only; what waits is one product a row."""
    wide, narrow = sizes.wide, sizes.narrow
    in_place = wide == narrow
    flight = logits_row + (0 if in_place else logits_row // wide * narrow) + 2 * sizes.hidden * (wide + narrow)
    tile = grained(max(1, min(MOST_TILE_ROWS, sizes.scratch * 3 // 4 // flight)))
    whole = max(0, sizes.scratch - tile * flight) // (sizes.hidden * wide)
    return Route(
        sizes,
        tile,
        product_rows,
        area,
        whole,
        whole,
        max(1, whole),
        in_place=in_place,
        eager=True,
        hides_probabilities=sizes.hides,
    )
