"""Rows through the head and back, within a memory budget: forward to statistics, backward from coefficients.

Forward runs GEMM 1 and the kernels tile by tile; backward runs GEMM 2 and 3. What lies between them (a loss, or a
whole autograd graph) does not matter here. Tiles are kept from forward to backward while the budget lasts and
recomputed where it does not, so a trainable head costs 3 GEMMs plus the recomputed share of one, a frozen one 2:

- *unscaled* (gradients through logp only): the sweep that makes the statistics writes G = d logp / dx over the
logits; then dH = c (G W), dW = G^T (c h), db = G^T c. The coefficient never enters the V-sized tile.
- otherwise (entropy, lse): the raw logits are kept, and backward turns them into dL/dx.
- *eager* (unscaled, frozen head): forward already runs GEMM 2; backward is a row scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.kernels import library
from fused_po.kernels.contract import PARTIALS, Coefficients, Transform, finish
from fused_po.ops.gradients import Gradients, Wanted
from fused_po.ops.head import Head
from fused_po.ops.planning import Rows, steps
from fused_po.stats import Stats

__all__ = ["Budget", "Sweep", "Workspace"]

# enough for the GEMMs to run at full rate
MAX_TILE_ROWS = 1024


@dataclass(frozen=True)
class Budget:
    """How many rows fit into ``scratch_bytes``.

    Attributes:
        whole: rows that fit when the tile of every row is kept.
        kept: rows whose tile is kept where not all fit, beside the tiles in flight.
        tile: rows in flight at a time.
    """

    whole: int
    kept: int
    tile: int

    @staticmethod
    def of(scratch_bytes: int, head: Head, *, unscaled: bool, wanted: Wanted, copies: bool = False) -> Budget:
        """Divide a budget; one under a row is raised to one row. With ``copies`` each tile in flight has a second."""
        vocab, width = head.weight.shape
        wide, narrow = head.accumulation_dtype.itemsize, head.compute_dtype.itemsize
        # a row on its way through GEMM 2 and 3: its hidden state and product, wide, and both as operands
        extra = 2 * width * (wide + narrow)
        # logits, and the gradient tile where that is a buffer of its own
        flight = vocab * ((wide if wide == narrow else wide + narrow) + (narrow if copies else 0)) + extra
        # nothing but products of width H waits beside the tiles of a frozen head
        frozen = unscaled and not wanted.head
        tile = max(1, min(scratch_bytes * (3 if frozen else 1) // 4 // flight, MAX_TILE_ROWS))
        beside = max(0, scratch_bytes - tile * flight)
        if not wanted.head:
            # only the product of GEMM 2 waits for its coefficient
            product = width * wide
            return Budget(beside // product if unscaled else beside // (vocab * wide + extra), 0, tile)
        row = vocab * (narrow if unscaled else wide) + extra
        if wide == narrow:
            # the kept tile is the one in flight
            copied = tile * vocab * narrow if copies else 0
            return Budget(max(1, (scratch_bytes - copied) // row), beside // row, tile)
        return Budget(max(1, beside // row), beside // row, tile)


class Workspace:
    """Scratch buffers that live as long as a call and are reused from chunk to chunk."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised (rows, width) buffer; whoever asks for the same name next gets the same memory."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < rows:
            # free the old one first
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = self._head.weight.new_empty((rows, width), dtype=dtype)
        return buffer[:rows]


class Sweep:
    """One pass of some rows through the head: ``forward``, then ``backward`` once the coefficients are known.

    Args:
        head: the head.
        hidden: (positions, H), in the caller's order, or (B, S, H).
        labels: (R,) of the rows.
        temperatures: (R,) or None.
        rows: which positions.
        budget: how many rows fit.
        wanted: which gradients will be asked for.
        unscaled: gradients come through logp only.
        workspace: where tiles live.
        home: for an eager sweep, where the product of GEMM 2 waits for its coefficient: (R, H), or None for the
            gradient's own memory.
        masked: rows without loss are among them, whose hidden states may be anything.
        active: how many of the rows, the leading ones, have a gradient; None: all.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        rows: Rows,
        budget: Budget,
        wanted: Wanted,
        *,
        unscaled: bool,
        workspace: Workspace,
        home: Tensor | None = None,
        masked: bool = False,
        active: int | None = None,
    ) -> None:
        self.head, self.hidden, self.labels, self.temperatures = head, hidden, labels, temperatures
        self.rows, self.budget, self.wanted, self.unscaled = rows, budget, wanted, unscaled
        self.workspace, self.home, self.masked = workspace, home, masked
        self.eager = unscaled and wanted.hidden and not wanted.head
        keeps = wanted.any and not self.eager
        self.active = rows.count if active is None else active
        # rows without a gradient pass through tiles in flight, for which ``kept`` leaves room
        room = rows.count if rows.count <= budget.whole else budget.kept
        self.kept_rows = min(room, self.active) if keeps else 0
        self.in_place = head.compute_dtype == head.accumulation_dtype
        self.kept: Tensor | None = None
        self.anchors: Tensor | None = None

    def forward(self, outputs: tuple[str, ...], gradients: Gradients | None = None) -> Stats:
        """GEMM 1 and the statistics (R,); eager sweeps put the product of GEMM 2 into ``home`` or ``gradients``."""
        head, partials = self.head, []
        if self.kept is None:
            dtype = head.compute_dtype if self.unscaled else head.accumulation_dtype
            self.kept = self.workspace.get("kept", self.kept_rows, head.columns, dtype)
        for first, last in self._steps(0, self.kept_rows):
            kept = self.kept[first:last]
            logits = kept if self.in_place or not self.unscaled else self._logits_buffer(last - first)
            head.logits_into(logits, self._hidden(first, last))
            if self.unscaled:
                partials.append(self._softmax(logits, first, last, outputs, None if logits is kept else kept))
            else:
                partials.append(self._stats(logits, first, last, outputs))
        eager = self.active if self.eager else self.kept_rows
        for first, last in self._steps(self.kept_rows, eager):
            logits = self._logits_buffer(last - first)
            head.logits_into(logits, self._hidden(first, last))
            tile = self._tile_buffer(logits)
            partials.append(self._softmax(logits, first, last, outputs, None if tile is logits else tile))
            product = head.hidden_grad(tile, head.kept_blocks(tile))
            if self.home is not None:
                self.home[first:last] = product
            elif gradients is not None and gradients.hidden is not None:
                self.rows.part(first, last).scatter(gradients.hidden, product)
        for first, last in self._steps(eager, self.rows.count):
            logits = self._logits_buffer(last - first)
            head.logits_into(logits, self._hidden(first, last))
            partials.append(self._stats(logits, first, last, outputs))
        merged = (
            torch.cat(partials, 1)
            if partials
            else self.hidden.new_zeros(len(PARTIALS), 0, dtype=head.accumulation_dtype)
        )
        stats, self.anchors = finish(merged, self.labels, head.classes, outputs)
        return stats

    def backward(self, coefficients: Coefficients, gradients: Gradients, groups: Tensor | None = None) -> None:
        """GEMM 2 and 3: add to ``gradients`` what the coefficients (A,) make of the active rows; ``groups`` (A,) names
        the part that each row belongs to.
        """
        if self.eager:
            self._scale_products(coefficients, gradients)
            return
        coefficients = gradients.normalised(coefficients)
        # kept tiles that need no other buffer go at once, so that dW is read and written once; rows of a part are
        # copied out of their tile
        alone = (self.in_place or self.unscaled) and groups is None
        if not self.active:
            return
        for first, last in steps(0, self.kept_rows, max(1, self.kept_rows) if alone else self.budget.tile):
            assert self.kept is not None
            tile = self.kept[first:last]
            if not self.unscaled:
                tile = self._grad(tile, first, last, coefficients)
            self._add(tile, first, last, coefficients, gradients, groups)
        for first, last in self._steps(self.kept_rows, self.active):
            logits = self._logits_buffer(last - first)
            self.head.logits_into(logits, self._hidden(first, last))
            if self.unscaled:
                tile = self._tile_buffer(logits)
                self._softmax(logits, first, last, ("logp",), None if tile is logits else tile)
            else:
                tile = self._grad(logits, first, last, coefficients)
            self._add(tile, first, last, coefficients, gradients, groups)

    def _add(
        self,
        tile: Tensor,
        first: int,
        last: int,
        coefficients: Coefficients,
        gradients: Gradients,
        groups: Tensor | None,
    ) -> None:
        """GEMM 2 and 3 of a gradient tile (R, V)."""
        head, part = self.head, self.rows.part(first, last)
        scalar = coefficients.logp[first:last] if self.unscaled and coefficients.logp is not None else None  # (R,)
        kept = head.kept_blocks(tile)
        if gradients.hidden is not None:
            product = head.hidden_grad(tile, kept)
            if scalar is not None:
                product.mul_(scalar.unsqueeze(1))
            part.scatter(gradients.hidden, gradients.restored(product))
        rows = self._hidden(first, last) if gradients.weights else None
        if rows is not None and scalar is not None:
            rows = rows.to(head.accumulation_dtype) * scalar.unsqueeze(1)
        gradients.add_head(head, tile, rows, scalar, None if groups is None else groups[first:last], kept)

    def _scale_products(self, coefficients: Coefficients, gradients: Gradients) -> None:
        assert coefficients.logp is not None and gradients.hidden is not None
        for first, last in steps(0, self.active, MAX_TILE_ROWS):
            part = self.rows.part(first, last)
            product = part.gather(gradients.hidden) if self.home is None else self.home[first:last]
            scaled = product.to(self.head.accumulation_dtype) * coefficients.logp[first:last].unsqueeze(1)
            part.scatter(gradients.hidden, scaled)

    def _stats(self, logits: Tensor, first: int, last: int, outputs: tuple[str, ...]) -> Tensor:
        head, labels = self.head, self.labels[first:last]
        found = library.row_stats(logits, labels, self._transform(first, last), head.span, outputs, head.backend)
        return found if head.shard is None else head.shard.merged(found)

    def _softmax(self, logits: Tensor, first: int, last: int, outputs: tuple[str, ...], out: Tensor | None) -> Tensor:
        head, labels, transform = self.head, self.labels[first:last], self._transform(first, last)
        if head.shard is None:
            return library.row_softmax(logits, labels, transform, head.span, outputs, out, head.backend)
        # a shard's probabilities wait for the sums of the others: statistics first, then G with c = 1
        partials = self._stats(logits, first, last, outputs)
        _, anchors = finish(partials, labels, head.classes, ())
        unscaled = Coefficients(torch.ones_like(anchors[0]))
        library.row_grad(logits, labels, transform, head.span, anchors, unscaled, out, head.backend)
        return partials

    def _grad(self, logits: Tensor, first: int, last: int, coefficients: Coefficients) -> Tensor:
        """dL/dx in the compute dtype; overwrites the logits where that is theirs."""
        head, tile = self.head, self._tile_buffer(logits)
        assert self.anchors is not None
        anchors = self.anchors[:, first:last]
        triple = Coefficients(*(None if c is None else c[first:last] for c in coefficients))
        out = None if tile is logits else tile
        labels, transform = self.labels[first:last], self._transform(first, last)
        library.row_grad(logits, labels, transform, head.span, anchors, triple, out, head.backend)
        return tile

    def _steps(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Row ranges at a time: kept tiles in place need no buffer in flight and go at once."""
        whole = self.in_place and last <= self.kept_rows
        step = max(1, last - first) if whole else self.budget.tile
        return steps(first, last, step)

    def _hidden(self, first: int, last: int) -> Tensor:
        rows = self.rows.part(first, last).vectors(self.hidden)
        # 0 times NaN would reach dW
        return torch.where((self.labels[first:last] >= 0).unsqueeze(1), rows, 0.0) if self.masked else rows

    def _transform(self, first: int, last: int) -> Transform:
        return self.head.transform(None if self.temperatures is None else self.temperatures[first:last])

    def _logits_buffer(self, rows: int) -> Tensor:
        return self.workspace.get("logits", rows, self.head.columns, self.head.accumulation_dtype)

    def _tile_buffer(self, logits: Tensor) -> Tensor:
        if self.in_place:
            return logits
        return self.workspace.get("tile", logits.shape[0], self.head.columns, self.head.compute_dtype)
