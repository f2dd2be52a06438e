"""Tiles that are rows times a slice of the vocabulary.

Partial statistics merge over slices, and once the coefficients of a row are known its gradient needs no whole row of
logits. So statistics alone, logits that are made again and tiles that are rewritten go slice by slice over a block of
rows: a weight that is stored in another dtype is cast once a block, and each slice of dW is written whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_po.kernels.contract import Coefficients, merge
from fused_po.ops.gradients import Gradients
from fused_po.ops.head import Head
from fused_po.ops.planning import Rows, steps
from fused_po.ops.routes import Route
from fused_po.ops.tokens import Tokens
from fused_po.ops.workspace import Workspace

__all__ = ["Piece", "add_pieces", "place", "statistics", "together"]


class Piece(NamedTuple):
    """Rows [first, last); ``kept``: their gradient tiles are there, else their logits are made again."""

    first: int
    last: int
    kept: bool


def statistics(
    tokens: Tokens, first: int, last: int, outputs: tuple[str, ...], route: Route, workspace: Workspace
) -> Tensor:
    """Partial statistics (7, R) of rows that keep nothing: GEMM 1, block by block and slice by slice."""
    head, found = tokens.head, []
    block, width = route.shape(last - first)
    for start, stop in steps(first, last, block):
        states = tokens.states(start, stop)
        partials = []
        for columns in _slices(head, width):
            logits = _buffer(workspace, "slice", stop - start, columns, head.accumulation_dtype)
            head.logits_into(logits, states, columns)
            partials.append(tokens.partials(logits, start, stop, columns, outputs))
        found.append(tokens.of_all_ranks(partials[0] if len(partials) == 1 else merge(torch.stack(partials))))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def add_pieces(
    tokens: Tokens,
    pieces: list[Piece],
    kept: Tensor,
    anchors: Tensor,
    coefficients: Coefficients,
    gradients: Gradients,
    groups: Tensor | None,
    route: Route,
    workspace: Workspace,
) -> None:
    """GEMM 2 and 3 of the pieces of a sweep.

    Args:
        kept: (K, V), what the leading rows keep.
        anchors: (4, R).
        coefficients: (A,) each, of the rows that have a gradient.
        groups: (A,) int64, the part of each row; None: all in the first.
    """
    run = _Run(tokens, kept, anchors, coefficients, gradients, route, workspace)
    # those whose tiles are there already: dH row by row of tiles, over the whole vocabulary
    for piece in pieces:
        if piece.kept:
            run.add_hidden(piece)
    workspace.free("product")
    if run.dropping or not (gradients.weight or gradients.biases):
        # nothing is left to make of them
        pieces = [piece for piece in pieces if not piece.kept]
    for some in together(pieces):
        run.add_slices(some, groups)


def together(pieces: list[Piece]) -> list[list[Piece]]:
    """Which pieces make each slice of dW together: tiles that are there already cost no memory beside others."""
    first = pieces[: 2 if pieces and pieces[0].kept else 1]
    return [some for some in (first, *([piece] for piece in pieces[len(first) :])) if some]


def place(product: Tensor, rows: Rows, factor: Tensor | None, gradients: Gradients, *, overwrite: bool) -> None:
    """Into dH: a product (R, H), over which one may write, times a factor (R,) and what normalised ones lack."""
    target = gradients.place_hidden()
    if gradients.scale is not None:
        factor = gradients.scale.expand(product.shape[0]) if factor is None else factor * gradients.scale
    window = rows.window(target)
    if factor is None:
        rows.scatter(target, product)
    elif window is not None:
        torch.mul(product, factor.unsqueeze(1), out=window)
    else:
        scaled = product.mul_(factor.unsqueeze(1)) if overwrite else product * factor.unsqueeze(1)
        rows.scatter(target, scaled)


@dataclass(frozen=True)
class _Run:
    """What the pieces of a sweep share."""

    tokens: Tokens
    kept: Tensor
    anchors: Tensor
    coefficients: Coefficients
    gradients: Gradients
    route: Route
    workspace: Workspace

    @property
    def dropping(self) -> bool:
        return bool(self.tokens.head.max_dropped_mass)

    @property
    def plain(self) -> bool:
        """The coefficient stays out of the tile."""
        return self.coefficients.entropy is None and self.coefficients.lse is None

    def add_hidden(self, piece: Piece) -> None:
        """GEMM 2 of tiles as they are; where blocks are dropped GEMM 3 of the blocks that count, too."""
        tokens, head, gradients = self.tokens, self.tokens.head, self.gradients
        if gradients.hidden_wanted or (self.dropping and gradients.weight):
            for first, last in steps(piece.first, piece.last, self.route.product_rows):
                tile, counted = self.kept[first:last], head.kept_blocks(self.kept[first:last])
                if gradients.hidden_wanted:
                    into = self.workspace.get("product", last - first, tokens.hidden.shape[-1], head.accumulation_dtype)
                    product = head.hidden_grad(None, tile, head.every(), counted, into)
                    self._finish(product, first, last)
                if counted is not None and gradients.weight:
                    rows = tokens.scaled_states(first, last, self._factor(first, last))
                    head.weight_grad(gradients.place_weights()[0], tile, rows, add=True, kept=counted)
        if self.dropping and gradients.biases:
            tile = self.kept[piece.first : piece.last]
            head.bias_grad(gradients.biases[0], tile, self._factor(piece.first, piece.last))

    def add_slices(self, pieces: list[Piece], groups: Tensor | None) -> None:
        """The rest of GEMM 2 and 3, slice by slice, of pieces that write each slice of dW together."""
        head, gradients = self.tokens.head, self.gradients
        own = _rows_of_parts(pieces, groups, gradients.parts)
        rows = [self._rows(piece) for piece in pieces] if gradients.weight else []
        states = [self.tokens.states(piece.first, piece.last) if not piece.kept else None for piece in pieces]
        products: list[Tensor | None] = [None] * len(pieces)
        # rows of a part are copied out of their tile
        copied = [piece for piece in pieces if not piece.kept or groups is not None]
        step = head.columns
        if copied or self._rounds(len(pieces)):
            _, step = self.route.again(max([0, *(piece.last - piece.first for piece in copied)]))
        for columns in _slices(head, step):
            tiles = []
            for place_of, piece in enumerate(pieces):
                tile = self._tile(piece, columns, states[place_of])
                tiles.append(tile)
                counted = None if piece.kept else head.kept_blocks(tile)
                if gradients.hidden_wanted and not piece.kept:
                    products[place_of] = head.hidden_grad(products[place_of], tile, columns, counted)
                if counted is not None and gradients.weight:
                    target = gradients.place_weights()[0][columns]
                    head.weight_grad(target, tile, rows[place_of], add=True, kept=counted)
            for part in range(gradients.parts):
                mine = [
                    (tile if index is None else tile.index_select(0, index), index)
                    for tile, index in zip(tiles, own[part], strict=True)
                ]
                if gradients.weight and not self.dropping:
                    chosen = [r if i is None else r.index_select(0, i) for r, (_, i) in zip(rows, mine, strict=True)]
                    self._add_weight(part, columns, [tile for tile, _ in mine], chosen)
                if gradients.biases:
                    for piece, (tile, index) in zip(pieces, mine, strict=True):
                        factor = self._factor(piece.first, piece.last)
                        factor = factor if factor is None or index is None else factor.index_select(0, index)
                        head.bias_grad(gradients.biases[part][columns], tile, factor)
        gradients.started = gradients.started or gradients.weight
        for piece, product in zip(pieces, products, strict=True):
            if product is not None:
                self._finish(product, piece.first, piece.last)

    def _rounds(self, pieces: int) -> bool:
        """Slices of dW are made in another dtype than they are stored in, and rounded once."""
        head, gradients = self.tokens.head, self.gradients
        if not gradients.weight or gradients.accumulate:
            return False
        if gradients.scale is not None or gradients.stored not in (head.compute_dtype, head.accumulation_dtype):
            return True
        return pieces > 1 and gradients.stored != head.accumulation_dtype

    def _add_weight(self, part: int, columns: slice, tiles: list[Tensor], rows: list[Tensor]) -> None:
        head, gradients = self.tokens.head, self.gradients
        target = gradients.place_weights()[part][columns]
        out, add = target, gradients.started
        if self._rounds(len(tiles)):
            out, add = (
                self.workspace.get("slice of dW", target.shape[0], target.shape[1], head.accumulation_dtype),
                False,
            )
        for tile, states in zip(tiles, rows, strict=True):
            if tile.shape[0]:
                head.weight_grad(out, tile, states, add=add)
                add = True
        if not add:
            out.zero_()
        if out is not target:
            if gradients.scale is None:
                target.copy_(out)
            else:
                torch.mul(out, gradients.scale, out=target)

    def _tile(self, piece: Piece, columns: slice, states: Tensor | None) -> Tensor:
        """The gradient tile (R, columns) of a piece, made from its hidden states (R, H) where it is not kept."""
        tokens, head, first, last = self.tokens, self.tokens.head, piece.first, piece.last
        if states is None:
            return self.kept[first:last, columns]
        given = None if self.plain else Coefficients(*(None if c is None else c[first:last] for c in self.coefficients))
        wide, narrow = head.accumulation_dtype, head.compute_dtype
        logits = out = _buffer(self.workspace, "slice", last - first, columns, wide)
        if wide != narrow:
            out = _buffer(self.workspace, "tile slice", last - first, columns, narrow)
        head.logits_into(logits, states, columns)
        anchors = self.anchors[:, first:last]
        tokens.gradient(logits, first, last, columns, anchors, given, None if out is logits else out)
        return out

    def _rows(self, piece: Piece) -> Tensor:
        """What GEMM 3 multiplies the tiles of a piece with: (R, H)."""
        return self.tokens.scaled_states(piece.first, piece.last, self._factor(piece.first, piece.last))

    def _factor(self, first: int, last: int) -> Tensor | None:
        """The coefficient (R,) that is not in the tile."""
        c = self.coefficients.logp if self.plain else None
        return None if c is None else c[first:last]

    def _finish(self, product: Tensor, first: int, last: int) -> None:
        head = self.tokens.head
        if head.shard is not None:
            head.shard.summed(product)
        place(product, self.tokens.rows.part(first, last), self._factor(first, last), self.gradients, overwrite=True)


def _rows_of_parts(pieces: list[Piece], groups: Tensor | None, parts: int) -> list[list[Tensor | None]]:
    """By part and piece, the rows (P,) of the piece that belong to the part; None: all. Waits for the groups."""
    if groups is None:
        return [[None] * len(pieces)]
    return [
        [(groups[piece.first : piece.last] == part).nonzero().squeeze(1) for piece in pieces] for part in range(parts)
    ]


def _slices(head: Head, step: int) -> Iterator[slice]:
    """The vocabulary in slices of ``step`` columns; columns behind the classes go with the last."""
    classes = head.span(head.every()).width
    for first, last in steps(0, classes, max(1, step)):
        yield slice(first, head.columns if last == classes else last)


def _buffer(workspace: Workspace, name: str, rows: int, columns: slice, dtype: torch.dtype) -> Tensor:
    return workspace.get(name, rows, columns.stop - columns.start, dtype)
