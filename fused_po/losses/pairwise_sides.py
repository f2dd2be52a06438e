"""Pairwise losses in which the chosen and the rejected answer each have an aim of their own.

u and v are the log-ratios of chosen and rejected to the reference, h = u - v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.pairwise import ReferenceLoss
from fused_po.losses.registry import register
from fused_po.losses.shift import ShiftedLoss
from fused_po.losses.terms import require_range, sigmoid_loss
from fused_po.stats import Stats

__all__ = ["ApoDown", "ApoZero", "BcoPair", "CalDPO", "Dpop", "NcaPair", "SppoHard"]


@register("nca_pair")
@dataclass(frozen=True)
class NcaPair(ReferenceLoss):
    """NCA on pairs: ``-log sigmoid(beta u) - [log sigmoid(-beta u) + log sigmoid(-beta v)] / 2`` (Chen et al., arXiv
    2402.05369)."""

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        up, down = self.beta * chosen, self.beta * rejected
        return sigmoid_loss(up) + 0.5 * (sigmoid_loss(-up) + sigmoid_loss(-down))


@register("bco_pair")
@dataclass(frozen=True)
class BcoPair(ShiftedLoss, ReferenceLoss):
    """BCO on pairs: ``-log sigmoid(beta u - shift) - log sigmoid(-(beta v - shift))`` (Jung et al., arXiv 2404.04656).

    ``shift`` and ``shift_weight`` as in ``ShiftedLoss``. TRL >= 0.29 takes no shift, earlier versions a running mean of
    the rewards.
    """

    given_horizon: ClassVar[str] = "pair"

    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        rewards = self.beta * self.log_ratios(stats, batch)
        return rewards - self.shift(rewards, batch)

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return sigmoid_loss(chosen) + sigmoid_loss(-rejected)


@register("sppo_hard")
@dataclass(frozen=True)
class SppoHard(ReferenceLoss):
    """SPPO with hard wins: ``(u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2`` (Wu et al., arXiv 2405.00675, eq. 4.7 with
    P = 1 and 0).

    Args:
        beta: 0.1, > 0.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "beta", 0.0, math.inf, open_low=True)

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return _squared_aims(chosen, rejected, self.beta)


@register("cal_dpo")
@dataclass(frozen=True)
class CalDPO(ReferenceLoss):
    """Cal-DPO: ``-log sigmoid(h) + [(u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2] / 2`` (Xiao et al., arXiv 2412.14516).

    Args:
        beta: 0.1, > 0; only the aims of the log-ratios depend on it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "beta", 0.0, math.inf, open_low=True)

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return sigmoid_loss(chosen - rejected) + 0.5 * _squared_aims(chosen, rejected, self.beta)


@register("apo_zero")
@dataclass(frozen=True)
class ApoZero(ReferenceLoss):
    """APO-zero, chosen up and rejected down: ``1 - sigmoid(beta u) + sigmoid(beta v)`` (D'Oosterlinck et al., arXiv
    2408.06266, eq. 7)."""

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)


@register("apo_down")
@dataclass(frozen=True)
class ApoDown(ReferenceLoss):
    """APO-down, both down and rejected more: ``sigmoid(beta u) + 1 - sigmoid(beta h)`` (D'Oosterlinck et al., arXiv
    2408.06266, eq. 8)."""

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))


@register("dpop")
@dataclass(frozen=True)
class Dpop(ReferenceLoss):
    """DPO-Positive, which keeps the chosen answer as likely as under the reference: ``-log sigmoid(beta (h - lambda
    max(0, -u)))`` (Pal et al., arXiv 2402.13228).

    Args:
        beta: 0.1 (the paper: 0.3).
        dpop_lambda: lambda >= 0, 50.
    """

    dpop_lambda: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "dpop_lambda", 0.0, math.inf)

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return sigmoid_loss(self.beta * (chosen - rejected - self.dpop_lambda * F.relu(-chosen)))


def _squared_aims(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    aim = 1.0 / (2.0 * beta)
    return (chosen - aim).square() + (rejected + aim).square()
