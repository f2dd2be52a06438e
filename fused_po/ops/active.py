"""Rows that need no gradient, known before the call: they never enter GEMM 2 and 3, and their tiles are not kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.ops.devices import has_values
from fused_po.ops.planning import Rows

__all__ = ["Arranged", "host_mask"]


def host_mask(silent: Tensor | None, may_wait: bool) -> Tensor | None:
    """The silent rows (N,) on the host, or None where there are none, or where looking would wait for a GPU."""
    if silent is None or torch.compiler.is_compiling() or not has_values(silent) or (silent.is_cuda and not may_wait):
        return None
    found = silent.cpu()
    return found if bool(found.any()) else None


@dataclass(frozen=True)
class Arranged:
    """Rows of a chunk, those with a gradient first.

    Attributes:
        rows: the rows in the order of the sweep.
        planned: (R,) int64, their places in planned order; None: those of ``rows`` as they are.
        order: (R,) int64, their places in the chunk; None: unchanged.
        active: how many have a gradient.
    """

    rows: Rows
    planned: Tensor | None
    order: Tensor | None
    active: int

    @staticmethod
    def of(rows: Rows, silent: Tensor | None, device: torch.device) -> Arranged:
        """Arrange rows by the mask of silent ones (N,) in planned order, on the host."""
        mine = None if silent is None else rows.take(silent)
        if mine is None or not bool(mine.any()):
            return Arranged(rows, None, None, rows.count)
        order = torch.cat([(~mine).nonzero(), mine.nonzero()]).squeeze(1)
        places = torch.cat([torch.arange(start, stop, device="cpu") for start, stop in rows.ranges])[order]
        order, planned = order.to(device, non_blocking=True), places.to(device, non_blocking=True)
        positions = planned if rows.positions is None else rows.positions.index_select(0, planned)
        active = rows.count - int(mine.sum())
        return Arranged(Rows(((0, rows.count),), positions), planned, order, active)

    def take(self, planned: Tensor) -> Tensor:
        """From planned order (N, ...) into that of the sweep (R, ...)."""
        return self.rows.take(planned) if self.planned is None else planned.index_select(0, self.planned)

    def arranged(self, values: Tensor) -> Tensor:
        """From the order of the chunk (R,) into that of the sweep, rows with a gradient only: (A,)."""
        return values if self.order is None else values.index_select(0, self.order[: self.active])

    def restored(self, values: Tensor) -> Tensor:
        """From the order of the sweep (R,) into that of the chunk."""
        return values if self.order is None else torch.empty_like(values).index_copy_(0, self.order, values)
