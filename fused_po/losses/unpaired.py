"""Losses on single answers that are desirable or not.

u is the log-ratio of an answer to the reference.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import Loss
from fused_po.losses.metrics import entropy_metric, logit_metrics
from fused_po.losses.registry import register
from fused_po.losses.shift import ShiftedLoss
from fused_po.losses.terms import choose, policy_logp, require_range, sequence_log_ratio, sigmoid_loss
from fused_po.stats import Stats

__all__ = ["ApoZeroUnpaired", "Bco", "Kto"]


@dataclass(frozen=True)
class UnpairedLoss(Loss):
    """Base: a loss of each answer's reward ``beta u``, mean over all answers.

    Side inputs: ``ref_logp``; ``desirable`` (B,) bool.

    Args:
        beta: 0.1.
        desirable_weight: 1.0.
        undesirable_weight: 1.0.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def horizon(self) -> str:
        return "sequence"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "ref_logp", "desirable"}) | self.also_needs

    @property
    def reports(self) -> tuple[str, ...]:
        return ("entropy", "mean_logit")

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            require_range(self, name, 0.0, math.inf)

    @abstractmethod
    def shift(self, rewards: Tensor, batch: Batch) -> Tensor | float:
        """What a reward is compared with, detached, ()."""

    @abstractmethod
    def of_margin(self, margin: Tensor) -> Tensor:
        """The loss of answers that should have a large margin: (B,) -> (B,)."""

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        desirable = _desirable(batch)
        rewards = self.beta * sequence_log_ratio(stats, batch)
        margin = rewards - self.shift(rewards, batch)
        value = torch.where(
            desirable,
            self.desirable_weight * self.of_margin(margin),
            self.undesirable_weight * self.of_margin(-margin),
        )
        return {"preference": batch.mean_sequences(value)}

    def silent(self, batch: Batch) -> Tensor | None:
        """A side that weighs nothing."""
        if self.desirable_weight != 0.0 and self.undesirable_weight != 0.0:
            return None
        return batch.spread(choose(_desirable(batch), self.desirable_weight, self.undesirable_weight)) == 0

    def role(self, batch: Batch) -> Tensor:
        return batch.spread(choose(_desirable(batch), 1.0, -1.0))

    def weight(self, c: Tensor, batch: Batch) -> Tensor:
        """|dL/d(reward)| of the answer."""
        return c.abs() * batch.num_sequences / (self.beta or 1.0)

    def pattern(self, batch: Batch) -> Tensor | None:
        return torch.ones_like(batch.chosen, dtype=torch.float64)

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        desirable = _desirable(batch)
        rewards = self.beta * sequence_log_ratio(stats, batch)
        logps = batch.sum_per_sequence(policy_logp(stats))
        found = entropy_metric(stats, batch) | logit_metrics(stats, batch, batch.spread(desirable))
        for side, members in (("chosen", desirable), ("rejected", ~desirable)):
            # NaN without a member, as a mean over nothing
            count = members.sum()
            found[f"rewards/{side}"] = torch.where(members, rewards, 0.0).sum() / count
            found[f"logps/{side}"] = torch.where(members, logps, 0.0).sum() / count
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


@register("kto")
@dataclass(frozen=True)
class Kto(UnpairedLoss):
    """KTO: ``w_D (1 - sigmoid(beta (u - z0)))`` on desirable answers, ``w_U (1 - sigmoid(beta (z0 - u)))`` on the
    others, mean over all (Ethayarajh et al., arXiv 2402.01306, eq. 7, as TRL's ``KTOTrainer`` computes it).

    Side inputs: ``kl``, the scalar z0 >= 0, detached (TRL: the mean over ranks and batch of mismatched prompt and
    completion log-ratios, clamped at 0).
    """

    also_needs: ClassVar[frozenset[str]] = frozenset({"kl"})

    def shift(self, rewards: Tensor, batch: Batch) -> Tensor | float:
        kl = batch.scalar("kl")
        assert kl is not None
        return self.beta * kl

    def of_margin(self, margin: Tensor) -> Tensor:
        # 1 - sigmoid(x)
        return torch.sigmoid(-margin)

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        kl = batch.scalar("kl")
        assert kl is not None
        return super().metrics(stats, batch) | {"kl": kl}


@register("apo_zero_unpaired")
@dataclass(frozen=True)
class ApoZeroUnpaired(UnpairedLoss):
    """APO-zero on single answers: ``w_D (1 - sigmoid(beta u))`` on desirable ones, ``w_U sigmoid(beta u)`` on the
    others (D'Oosterlinck et al., arXiv 2408.06266, eq. 7).
    """

    def shift(self, rewards: Tensor, batch: Batch) -> Tensor | float:
        return 0.0

    def of_margin(self, margin: Tensor) -> Tensor:
        return torch.sigmoid(-margin)


@register("bco")
@dataclass(frozen=True)
class Bco(ShiftedLoss, UnpairedLoss):
    """BCO, a binary classifier: ``-w_D log sigmoid(beta u - shift)`` on desirable answers, ``-w_U log sigmoid(shift -
    beta u)`` on the others (Jung et al., arXiv 2404.04656).

    ``shift`` and ``shift_weight`` as in ``ShiftedLoss``.
    """

    given_horizon: ClassVar[str] = "sequence"

    def of_margin(self, margin: Tensor) -> Tensor:
        return sigmoid_loss(margin)

    def pattern(self, batch: Batch) -> Tensor | None:
        return super().pattern(batch) if self.shift_weight == 1.0 else None

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        rewards = self.beta * sequence_log_ratio(stats, batch)
        return super().metrics(stats, batch) | {"delta": self.shift(rewards, batch)}


def _desirable(batch: Batch) -> Tensor:
    desirable = batch.sequence("desirable")
    assert desirable is not None
    return desirable
