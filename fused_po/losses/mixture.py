"""A weighted sum of losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import HORIZONS, Loss, per_token
from fused_po.stats import DIFFERENTIABLE, Stats

__all__ = ["Mixture"]


@dataclass(frozen=True)
class Mixture(Loss):
    """``sum_k weight_k loss_k`` on the same batch (MPO: Wang et al., arXiv 2411.10442), TRL's ``loss_type`` list.

    Args:
        losses: what is summed.
        weights: finite numbers, one for each.
    """

    losses: tuple[Loss, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.losses or len(self.losses) != len(self.weights):
            raise ValueError(
                f"loss_weights must be one number per loss: got {len(self.weights)} for {len(self.losses)}"
            )
        for weight in self.weights:
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"loss_weights must be finite numbers: got {weight!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the parts."""
        return "+".join(part.name for part in self.losses)

    @property
    def parts(self) -> tuple[tuple[float, Loss], ...]:
        return tuple(zip(self.weights, self.losses, strict=True))

    @property
    def horizon(self) -> str:
        return HORIZONS[max(HORIZONS.index(part.horizon) for part in self.losses)]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.needs for part in self.losses))

    @property
    def reports(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.losses for name in part.reports))

    @property
    def differentiates(self) -> tuple[str, ...]:
        wanted = {name for part in self.losses for name in part.differentiates}
        return tuple(name for name in DIFFERENTIABLE if name in wanted)

    @property
    def weighs_sequences(self) -> bool:  # type: ignore[override]
        return all(part.weighs_sequences for part in self.losses)

    @property
    def has_unsided_terms(self) -> bool:
        return any(part.has_unsided_terms for part in self.losses)

    @property
    def not_additive(self) -> str | None:
        """That of the first part that has one."""
        return next((part.not_additive for part in self.losses if part.not_additive is not None), None)

    def silent(self, batch: Batch) -> Tensor | None:
        """Rows that are silent in every part."""
        found = None
        for part in self.losses:
            mask = part.silent(batch)
            if mask is None:
                return None
            found = mask if found is None else found & mask
        return found

    def role(self, batch: Batch) -> Tensor:
        """The sides of the first part that has any."""
        role = super().role(batch)
        for part in self.losses:
            role = torch.where(role == 0, per_token(part.role(batch), batch, "role", part), role)
        return role

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        return {
            f"{index}/{part.name}/{term}": weight * value
            for index, (weight, part) in enumerate(self.parts)
            for term, value in part(stats, batch).items()
        }

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.losses:
            found = part.metrics(stats, batch) | found
        return found
