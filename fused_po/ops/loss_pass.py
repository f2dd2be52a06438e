"""The pass of a loss that is known before backward: chunks of whole horizons, from hidden states to gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.kernels.contract import Coefficients
from fused_po.losses.contract import HORIZONS, Batch, Loss
from fused_po.ops.active import Arranged, host_mask
from fused_po.ops.batches import chunk_batch, masked_stats
from fused_po.ops.calls import HeadCall
from fused_po.ops.checks import looks_at
from fused_po.ops.coefficients import coefficients, loss_value, silent_rows
from fused_po.ops.declared import off_pattern, pattern_error, pattern_of
from fused_po.ops.gradients import Gradients
from fused_po.ops.head import Head
from fused_po.ops.output import THIRDS, parts_of
from fused_po.ops.planning import Chunk, Rows, cut, steps
from fused_po.ops.routes import Route
from fused_po.ops.sweep import Sweep
from fused_po.ops.workspace import Workspace
from fused_po.splits import Split
from fused_po.stats import STATISTICS, Stats

__all__ = ["LossPass"]


class LossPass:
    """One call of ``linear_loss``.

    Attributes:
        route: how it goes.
        gradients: what they have become so far.
        pending: where GEMM 2 and 3 wait for backward, the sweep that they belong to, the order of its rows and their
            coefficients c (A,); else None.
    """

    def __init__(
        self,
        call: HeadCall,
        head: Head,
        loss: Loss,
        split: Split | None,
        names: tuple[str, ...],
        asked: tuple[str, ...],
        hidden: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
    ) -> None:
        self.call, self.loss, self.split, self.names, self.asked = call, loss, split, names, asked
        self.hidden, self.labels, self.temperatures = hidden, labels, temperatures
        self.unscaled = loss.differentiates == ("logp",)
        sizes, parts = call.sizes(head), bool(names)
        self.route = Route.of(sizes, call.plan.count, fused=True, unscaled=self.unscaled, parts=parts)
        self.stored = head.weight.dtype
        self.head = head.copied() if call.wanted.any else head
        self.outputs = tuple(dict.fromkeys((*asked, "logp")))
        self.groups: list[tuple[Rows, Tensor]] = []
        self.workspace = Workspace(hidden)
        self.silent: Tensor | None = None
        self.several = False
        self.pending: tuple[Sweep, Arranged, Tensor] | None = None
        self._gradients: Gradients | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The value (), the factor () that gradients still lack, and the statistics in planned order."""
        horizon = self.loss.horizon if self.split is None else self.split.horizon(self.loss)
        horizon = HORIZONS[-1] if self.names == THIRDS else horizon
        chunks = cut(self.call.plan, horizon, self.route.chunk_rows(self.call.plan.count))
        self.several = len(chunks) > 1
        wide = self.head.accumulation_dtype
        if self.call.wanted.any and not self.names:
            self.silent = host_mask(silent_rows(self.loss, batch, self.split), self.call.may_wait)
        if self.several and self.call.wanted.any and not self.route.eager:
            # once, for the largest of them
            most = max(self.route.keeps(chunk.rows.count, True) for chunk in chunks)
            self.workspace.get("kept", most, self.head.columns, self.head.compute_dtype)
        value = self.hidden.new_zeros((), dtype=torch.float64)
        factor = self.hidden.new_ones((), dtype=wide)
        parts: list[tuple[Rows, Stats]] = []
        for chunk in chunks:
            part = chunk_batch(batch, chunk) if self.several else batch
            pattern = self._pattern(chunk, part)
            if pattern is None:
                found, stats = self._chunk(chunk, part)
            else:
                found, stats, factor = self._deferred(chunk, part, pattern.to(wide))
            value = value + found
            parts.append((chunk.rows, stats))
        return value, factor, {name: self._collect(name, parts) for name in self.asked}

    @property
    def gradients(self) -> Gradients:
        """Made where they are first asked for, to be added to."""
        if self._gradients is None:
            self._gradients = self._new_gradients(accumulate=True)
        return self._gradients

    def keep_parts(self, kept: dict[str, Tensor]) -> None:
        """What ``SplitGradients`` is made of: the part of each row, a copy of dH, and dW and db of each part."""
        count = sum(rows.count for rows, _ in self.groups)
        found = self.labels.new_zeros(count)
        for rows, groups in self.groups:
            Rows(rows.ranges, None).scatter(found, groups)
        kept["groups"] = found
        if self.gradients.hidden is not None:
            kept["hidden"] = self.gradients.hidden.clone()
        for name, grads in (("weight", self.gradients.weights), ("bias", self.gradients.biases)):
            for part, grad in zip(self.names, grads, strict=False):
                kept[f"{name}/{part}"] = grad if self.gradients.scale is None else grad * self.gradients.scale

    def _pattern(self, chunk: Chunk, batch: Batch) -> Tensor | None:
        """The pattern of the coefficients, where their scalar must be waited for: one horizon that does not fit."""
        # a split scales the sides apart
        route, alone = self.route, not self.several and not (self.split or self.names)
        pays = alone and chunk.rows.count > route.alone and route.chunk == route.whole
        return pattern_of(self.loss, batch) if pays and self.unscaled and self.call.wanted.head else None

    def _chunk(self, chunk: Chunk, batch: Batch) -> tuple[Tensor, Stats]:
        home = None
        arranged = Arranged.of(chunk.rows, self.silent, self.hidden.device)
        if self.route.eager and arranged.active <= self.route.whole:
            home = self.workspace.get("home", arranged.active, self.hidden.shape[-1], self.head.accumulation_dtype)
        sweep = self._sweep(arranged, home)
        if self._gradients is None:
            once = not (self.several or self.route.wide) and sweep.writes_once
            self._gradients = self._new_gradients(accumulate=not once)
        found = sweep.forward(self.outputs, self._gradients).present()
        stats = masked_stats(Stats(**{name: arranged.restored(v) for name, v in found.items()}), batch.mask)
        if not self.call.wanted.any and not self.names:
            return loss_value(self.loss, stats, batch), stats
        value, triple = coefficients(self.loss, stats, batch, self.split)
        groups = None
        if self.names:
            groups = parts_of(self.names, self.loss, stats, batch)
            self.groups.append((chunk.rows, groups))
        if self.call.wanted.any:
            triple = Coefficients(*(None if c is None else arranged.arranged(c) for c in triple))
            waits = not self.several and 0 < chunk.rows.count <= self.route.waiting
            if waits and triple.logp is not None:
                self.pending = (sweep, arranged, triple.logp)
            else:
                sweep.backward(triple, self._gradients, groups)
        return value, stats

    def _deferred(self, chunk: Chunk, batch: Batch, pattern: Tensor) -> tuple[Tensor, Stats, Tensor]:
        """Accumulate with the pattern; the horizon's scalar comes last, as the factor of all gradients."""
        self.several = True
        parts: list[tuple[Rows, Stats]] = []
        for first, last in steps(0, chunk.rows.count, self.route.chunk_rows(chunk.rows.count)):
            rows = chunk.rows.part(first, last)
            sweep = self._sweep(Arranged.of(rows, None, self.hidden.device), None)
            stats = sweep.forward(self.outputs)
            sweep.backward(Coefficients(pattern[first:last]), self.gradients)
            parts.append((Rows(((first, last),), None), stats))
        whole = Stats(**{name: self._collect(name, parts) for name in STATISTICS if name in self.outputs})
        whole = masked_stats(whole, batch.mask)
        value, triple = coefficients(self.loss, whole, batch, self.split)
        assert triple.logp is not None
        # c = scalar * pattern: least squares gives the scalar back without looking for a non-zero entry
        squares = pattern.double().square().sum()
        scalar = (triple.logp.double() * pattern).sum() / torch.where(squares > 0, squares, 1.0)
        off = off_pattern(triple.logp, pattern, scalar, whole, batch)
        if looks_at(off) and bool(off):
            raise pattern_error(self.loss)
        # asking a GPU would wait for it, and a trace can't: NaN says that there is no gradient
        scalar = torch.where(off, torch.nan, scalar)
        return value, whole, scalar.to(self.head.accumulation_dtype)

    def _new_gradients(self, accumulate: bool) -> Gradients:
        wanted, parts = self.call.wanted, max(1, len(self.names))
        covered = self.call.plan.rows is None and self.silent is None
        return Gradients(wanted, self.hidden, self.head, self.stored, parts, accumulate=accumulate, covered=covered)

    def _sweep(self, arranged: Arranged, home: Tensor | None) -> Sweep:
        tokens = self.call.tokens(self.head, self.hidden, self.labels, self.temperatures, arranged)
        wanted, active = self.call.wanted, arranged.active
        return Sweep(tokens, self.route, wanted, self.workspace, home=home, active=active, several=self.several)

    def _collect(self, name: str, parts: list[tuple[Rows, Stats]]) -> Tensor:
        """One statistic of all chunks in planned order, (N,)."""
        if len(parts) == 1 and len(parts[0][0].ranges) == 1:
            found: Tensor = getattr(parts[0][1], name)
            return found
        dtype = torch.bool if name == "is_top1" else self.head.accumulation_dtype
        out = self.hidden.new_zeros(sum(rows.count for rows, _ in parts), dtype=dtype)
        for rows, stats in parts:
            Rows(rows.ranges, None).scatter(out, getattr(stats, name))
        return out
