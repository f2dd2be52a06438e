"""Some rows of a call on their way through the head: their operands, and the kernels over tiles of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.kernels import library
from fused_po.kernels.contract import Coefficients, Transform, finish
from fused_po.ops.head import Head
from fused_po.ops.planning import Rows

__all__ = ["Tokens"]


@dataclass(frozen=True)
class Tokens:
    """Rows of a call; [first, last) are places among them, ``columns`` a slice of the vocabulary.

    Attributes:
        head: the head.
        hidden: (positions, H), in the caller's order, or (B, S, H).
        labels: (R,) of the rows.
        temperatures: (R,) or None.
        rows: which positions.
        masked: rows without loss are among them, whose hidden states may be anything.
    """

    head: Head
    hidden: Tensor  # (positions, H)
    labels: Tensor  # (R,)
    temperatures: Tensor | None  # (R,)
    rows: Rows
    masked: bool

    @property
    def count(self) -> int:
        return self.rows.count

    def states(self, first: int, last: int) -> Tensor:
        """Hidden states (R, H) in the compute dtype."""
        return self._states(first, last).to(self.head.compute_dtype)

    def _states(self, first: int, last: int) -> Tensor:
        rows = self.rows.part(first, last).vectors(self.hidden)
        # 0 times NaN would reach dW
        return torch.where((self.labels[first:last] >= 0).unsqueeze(1), rows, 0.0) if self.masked else rows

    def scaled_states(self, first: int, last: int, factor: Tensor | None) -> Tensor:
        """Hidden states times a factor (R,), rounded once to the compute dtype: (R, H)."""
        rows = self._states(first, last)
        if factor is None:
            return rows.to(self.head.compute_dtype)
        out = rows.new_empty(rows.shape, dtype=self.head.compute_dtype)
        return torch.mul(rows, factor.unsqueeze(1), out=out)

    def partials(self, logits: Tensor, first: int, last: int, columns: slice, outputs: tuple[str, ...]) -> Tensor:
        """Partial statistics (7, R) of raw logits (R, columns), of this rank's classes."""
        head = self.head
        labels, transform = self.labels[first:last], self.transform(first, last)
        return library.row_stats(logits, labels, transform, head.span(columns), outputs, head.backend)

    def of_all_ranks(self, partials: Tensor) -> Tensor:
        """Partial statistics (7, R) of the whole vocabulary from those of this rank's classes."""
        return partials if self.head.shard is None else self.head.shard.merged(partials)

    def softmax(self, logits: Tensor, first: int, last: int, outputs: tuple[str, ...], out: Tensor | None) -> Tensor:
        """G = d logp / dx into ``out`` (R, V), or over the logits, with the partial statistics of all ranks."""
        head, labels, transform = self.head, self.labels[first:last], self.transform(first, last)
        every = head.every()
        if head.shard is None:
            return library.row_softmax(logits, labels, transform, head.span(every), outputs, out, head.backend)
        # a shard's probabilities wait for the sums of the others: statistics first
        partials = self.of_all_ranks(self.partials(logits, first, last, every, outputs))
        _, anchors = finish(partials, labels, head.classes, ())
        self.gradient(logits, first, last, every, anchors, None, out)
        return partials

    def gradient(
        self,
        logits: Tensor,
        first: int,
        last: int,
        columns: slice,
        anchors: Tensor,
        coefficients: Coefficients | None,
        out: Tensor | None,
    ) -> None:
        """dL/dx (R, columns) from raw logits, into ``out`` or over them; without coefficients that is G.

        Args:
            anchors: (4, R), of these rows.
            coefficients: (R,) each, of these rows.
        """
        head, labels, transform = self.head, self.labels[first:last], self.transform(first, last)
        if coefficients is None:
            coefficients = Coefficients(torch.ones_like(anchors[0]))
        span = head.span(columns)
        library.row_grad(logits, labels, transform, span, anchors, coefficients, out, head.backend)

    def turned(self, tile: Tensor, first: int, last: int, anchors: Tensor, coefficients: Coefficients) -> None:
        """G (R, V) becomes dL/dx: without a softcap."""
        head, labels, transform = self.head, self.labels[first:last], self.transform(first, last)
        library.row_regrad(tile, labels, transform, head.span(head.every()), anchors, coefficients, head.backend)

    def transform(self, first: int, last: int) -> Transform:
        """The logit transform of rows."""
        return self.head.transform(None if self.temperatures is None else self.temperatures[first:last])
