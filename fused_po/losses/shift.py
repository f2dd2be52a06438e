"""A shift of rewards by their running mean, for losses that classify answers one by one (BCO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import Loss
from fused_po.losses.terms import require_range

__all__ = ["ShiftedLoss"]


@dataclass(frozen=True)
class ShiftedLoss(Loss):
    """Base, put before the one that gives the loss.

    Side inputs: ``shift``, the running mean of the rewards before this batch, optional: 0.

    Args:
        shift_weight: 1.0, how much of the shift is the given one; the rest is the mean reward of this batch, detached,
            and makes the horizon the batch: micro-batches, each with a mean of its own, do not add up to the full
            batch. A running mean over n answers that takes in a batch of m has n / (n + m).
    """

    shift_weight: float = 1.0

    also_needs: ClassVar[frozenset[str]] = frozenset({"shift"})
    # where the shift is given
    given_horizon: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        require_range(self, "shift_weight", 0.0, 1.0)

    @property
    def horizon(self) -> str:
        return self.given_horizon if self.shift_weight == 1.0 else "batch"

    def shift(self, rewards: Tensor, batch: Batch) -> Tensor:
        """What rewards (B,) are compared with, detached, ()."""
        given = batch.scalar("shift")
        shift = rewards.new_zeros(()) if given is None else self.shift_weight * given
        if self.shift_weight == 1.0:
            return shift
        present = batch.lengths > 0
        mean = torch.where(present, rewards, 0.0).sum() / present.sum().clamp_min(1)
        return shift + (1.0 - self.shift_weight) * mean.detach()
