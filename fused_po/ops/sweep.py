"""Rows through the head and back: forward to statistics, backward from coefficients.

What lies between them (a loss, or a whole autograd graph) does not matter here. Forward runs GEMM 1 and the kernels,
backward GEMM 2 and 3. From forward to backward a row keeps

- *its gradient tile* G = d logp / dx, which the sweep that makes the statistics writes: 3 GEMMs. With gradients through
  logp only, dH = c (G W), dW = G^T (c h), db = G^T c: the coefficient never enters the V-sized tile. Those through the
  entropy or the log-normaliser turn G into dL/dx where it lies. A softcap hides the probabilities in G: then the logits
  are made again for that, and it costs 4 GEMMs, unless they were kept in its place, which takes a tile as wide as them;
- *nothing*, where the budget is spent: its logits are made again, too;
- *its product* G W, where the head is frozen and gradients come through logp only (an *eager* sweep): forward already
  runs GEMM 2, backward is a row scale.

Rows that keep a tile go through the head whole, a few hundred at a time. All else goes by slices of the vocabulary
(``slices``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_po.kernels.contract import PARTIALS, Coefficients, finish
from fused_po.ops.gradients import Gradients, Wanted
from fused_po.ops.planning import steps
from fused_po.ops.routes import Route
from fused_po.ops.slices import Piece, add_pieces, place, statistics, together
from fused_po.ops.tokens import Tokens
from fused_po.ops.workspace import Workspace
from fused_po.stats import Stats

__all__ = ["Sweep"]


class Sweep:
    """One pass of some rows through the head: ``forward``, then ``backward`` once the coefficients are known.

    Args:
        tokens: the rows.
        route: how many of them keep what, and the sizes of tiles.
        wanted: which gradients will be asked for.
        workspace: where tiles live.
        home: for an eager sweep, where the product of GEMM 2 waits for its coefficient: (R, H), or None for the
            gradient's own memory.
        active: how many of the rows, the leading ones, have a gradient; None: all.
        several: the rows are a chunk of several.

    Attributes:
        kept: (K, V), what the leading rows keep.
        anchors: (4, R), see ``kernels.contract``.
    """

    def __init__(
        self,
        tokens: Tokens,
        route: Route,
        wanted: Wanted,
        workspace: Workspace,
        *,
        home: Tensor | None = None,
        active: int | None = None,
        several: bool = False,
    ) -> None:
        self.tokens, self.route, self.wanted = tokens, route, wanted
        self.workspace, self.home = workspace, home
        self.active = tokens.count if active is None else active
        keeps = wanted.any and not route.eager
        self.kept_rows = route.keeps(self.active, several) if keeps else 0
        self.kept: Tensor | None = None
        self.anchors: Tensor | None = None

    def forward(self, outputs: tuple[str, ...], gradients: Gradients | None = None) -> Stats:
        """GEMM 1 and the statistics (R,); eager sweeps put the product of GEMM 2 into ``home`` or ``gradients``."""
        tokens, head, route = self.tokens, self.tokens.head, self.route
        partials = []
        swept = 0 if route.remakes else self.kept_rows
        if not route.remakes:
            self.kept = self._kept_buffer()
        for first, last in self._tiles(swept):
            assert self.kept is not None
            kept = self.kept[first:last]
            logits = kept if route.in_place else self._logits(first, last)
            head.logits_into(logits, tokens.states(first, last), head.every())
            if route.keeps_logits:
                found = tokens.of_all_ranks(tokens.partials(logits, first, last, head.every(), outputs))
            else:
                found = tokens.softmax(logits, first, last, outputs, None if route.in_place else kept)
            partials.append(found)
        eager = self.active if route.eager else swept
        for first, last in steps(swept, eager, route.tile):
            partials.append(self._product(first, last, outputs, gradients))
        if eager < tokens.count:
            self.workspace.free("logits")
            partials.append(statistics(tokens, eager, tokens.count, outputs, route, self.workspace))
        if not partials:
            partials.append(tokens.hidden.new_zeros(len(PARTIALS), 0, dtype=head.accumulation_dtype))
        merged = partials[0] if len(partials) == 1 else torch.cat(partials, 1)
        stats, self.anchors = finish(merged, tokens.labels, head.classes, outputs)
        return stats

    def backward(self, coefficients: Coefficients, gradients: Gradients, groups: Tensor | None = None) -> None:
        """GEMM 2 and 3: add to ``gradients`` what the coefficients (A,) make of the active rows; ``groups`` (A,) names
        the part that each row belongs to. Gradients through more than logp overwrite what is kept.
        """
        if self.route.eager:
            self._scale_products(coefficients, gradients)
            return
        assert self.anchors is not None
        coefficients = gradients.normalised(coefficients)
        if coefficients.entropy is not None or coefficients.lse is not None:
            self._turn(coefficients)
        assert self.kept is not None
        # what follows needs no whole rows of logits
        self.workspace.free("logits")
        add_pieces(
            self.tokens,
            self._pieces(),
            self.kept,
            self.anchors,
            coefficients,
            gradients,
            groups,
            self.route,
            self.workspace,
        )

    @property
    def writes_once(self) -> bool:
        """Backward writes each slice of dW once."""
        return self.route.eager or len(together(self._pieces())) <= 1

    def _pieces(self) -> list[Piece]:
        """The rows with a gradient: those that keep a tile, and blocks of the others."""
        rest = self.active - self.kept_rows
        block, _ = self.route.again(rest)
        found = [Piece(0, self.kept_rows, True)] if self.kept_rows else []
        return found + [Piece(first, last, False) for first, last in steps(self.kept_rows, self.active, block)]

    def _turn(self, coefficients: Coefficients) -> None:
        """What is kept becomes dL/dx."""
        tokens, head, route, anchors = self.tokens, self.tokens.head, self.route, self.anchors
        assert anchors is not None
        if self.kept is None:
            self.kept = self._kept_buffer()
        for first, last in self._tiles(self.kept_rows):
            kept = self.kept[first:last]
            mine = Coefficients(*(None if c is None else c[first:last] for c in coefficients))
            if not route.hides_probabilities:
                tokens.turned(kept, first, last, anchors[:, first:last], mine)
                continue
            logits = kept if route.in_place else self._logits(first, last)
            if not route.keeps_logits:
                head.logits_into(logits, tokens.states(first, last), head.every())
            out = None if route.in_place else kept
            tokens.gradient(logits, first, last, head.every(), anchors[:, first:last], mine, out)

    def _tiles(self, rows: int) -> Iterator[tuple[int, int]]:
        """Rows that keep something, so many at a time that their logits have room: all where they take no other."""
        return steps(0, rows, max(1, rows if self.route.in_place else self.route.tile))

    def _kept_buffer(self) -> Tensor:
        return self.workspace.get("kept", self.kept_rows, self.tokens.head.columns, self.tokens.head.compute_dtype)

    def _logits(self, first: int, last: int) -> Tensor:
        head = self.tokens.head
        return self.workspace.get("logits", last - first, head.columns, head.accumulation_dtype)

    def _product(self, first: int, last: int, outputs: tuple[str, ...], gradients: Gradients | None) -> Tensor:
        """GEMM 1 and 2 of rows; their partials."""
        tokens, head = self.tokens, self.tokens.head
        logits = tile = self._logits(first, last)
        if head.compute_dtype != head.accumulation_dtype:
            tile = self.workspace.get("tile", last - first, head.columns, head.compute_dtype)
        head.logits_into(logits, tokens.states(first, last), head.every())
        partials = tokens.softmax(logits, first, last, outputs, None if tile is logits else tile)
        into = None if self.home is None or self.home.dtype != head.accumulation_dtype else self.home[first:last]
        product = head.hidden_grad(None, tile, head.every(), head.kept_blocks(tile), into)
        if head.shard is not None:
            head.shard.summed(product)
        if self.home is None:
            assert gradients is not None
            tokens.rows.part(first, last).scatter(gradients.place_hidden(), product)
        elif product is not into:
            self.home[first:last] = product
        return partials

    def _scale_products(self, coefficients: Coefficients, gradients: Gradients) -> None:
        assert coefficients.logp is not None
        for first, last in steps(0, self.active, self.route.product_rows):
            rows = self.tokens.rows.part(first, last)
            product = rows.gather(gradients.place_hidden()) if self.home is None else self.home[first:last]
            place(product, rows, coefficients.logp[first:last], gradients, overwrite=False)
