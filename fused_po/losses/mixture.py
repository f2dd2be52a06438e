"""A weighted sum of losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import HORIZONS, Loss
from fused_po.stats import DIFFERENTIABLE, Stats

__all__ = ["Mixture"]


@dataclass(frozen=True)
class Mixture(Loss):
    """``sum_k weight_k loss_k`` on the same batch (MPO: Wang et al., arXiv 2411.10442), TRL's ``loss_type`` list.

    Args:
        parts: losses.
        weights: finite numbers, one for each.
    """

    parts: tuple[Loss, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise ValueError(f"loss_weights must be one number per loss: got {len(self.weights)} for {len(self.parts)}")
        for weight in self.weights:
            if not math.isfinite(weight):
                raise ValueError(f"loss_weights must be finite: got {weight}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the parts."""
        return "+".join(part.name for part in self.parts)

    @property
    def horizon(self) -> str:
        return max((part.horizon for part in self.parts), key=HORIZONS.index)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def reports(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.reports))

    @property
    def differentiates(self) -> tuple[str, ...]:
        wanted = {name for part in self.parts for name in part.differentiates}
        return tuple(name for name in DIFFERENTIABLE if name in wanted)

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        return {
            f"{index}/{part.name}/{term}": weight * value
            for index, (part, weight) in enumerate(zip(self.parts, self.weights, strict=True))
            for term, value in part(stats, batch).items()
        }

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found = part.metrics(stats, batch) | found
        return found
