"""PPO that restrains the tokens whose log-prob varies most with the advantage; they are found across the batch.

Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", arXiv 2505.22617.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.policy import Aggregated, ClippedLoss
from fused_po.losses.registry import register
from fused_po.losses.terms import (
    HUGE,
    advantages,
    clipped_surrogate,
    difference,
    old_logp,
    policy_logp,
    require_range,
)
from fused_po.stats import Stats

__all__ = ["ClipCov", "KlCov"]


@dataclass(frozen=True)
class CovarianceLoss(Aggregated, ClippedLoss):
    """Base: covariances are taken over all loss tokens of the call."""

    @property
    def own_horizon(self) -> str:
        return "batch"

    @property
    def horizon(self) -> str:
        return "batch"


@register("clip_cov")
@dataclass(frozen=True)
class ClipCov(CovarianceLoss):
    """Clip-Cov: ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` without a share of the tokens of high
    covariance of A and log pi (the product of what each is above its mean, between ``clip_cov_lb`` and
    ``clip_cov_ub``; Cui et al., arXiv 2505.22617).

    Which of them is chance in the paper and in verl; here it follows from their order and ``seed``, so that a step can
    be repeated: change the seed from step to step. Micro-batches, each with means of its own, do not add up to the full
    batch.

    Args:
        clip_cov_ratio: 2e-4, share of the call's tokens that is dropped, at least one token.
        clip_cov_lb: 1.0.
        clip_cov_ub: 5.0.
        seed: 0.
    """

    clip_cov_ratio: float = 2e-4
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "clip_cov_ratio", 0.0, 1.0, open_low=True)

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        logp, advantage = policy_logp(stats), advantages(batch)
        ratio = self.ratio(logp, batch)
        loss = clipped_surrogate(ratio, advantage, *self.bounds)
        unclipped = ~((loss > -ratio * advantage) & batch.loss_tokens())
        covariance = _covariance(logp, advantage, batch)
        candidates = (covariance > self.clip_cov_lb) & (covariance < self.clip_cov_ub) & unclipped & batch.loss_tokens()
        # the fractional part of multiples of the golden ratio: an order that does not cluster
        order = batch.loss_tokens().cumsum(0).double() + 7919.0 * self.seed
        drawn = _first(torch.where(candidates, torch.remainder(order * 0.6180339887498949, 1.0), torch.inf))
        dropped = candidates & (drawn < _share(self.clip_cov_ratio, batch))
        return torch.where(dropped, 0.0, loss)


@register("kl_cov")
@dataclass(frozen=True)
class KlCov(CovarianceLoss):
    """KL-Cov: ``-r A + ppo_kl_coef |log r|`` on the tokens with the largest covariance of A and log pi, ``-r A`` on the
    others (Cui et al., arXiv 2505.22617).

    Nothing is clipped; the clip metrics count what PPO would clip. Micro-batches, each with means of its own, do not
    add up to the full batch.

    Args:
        kl_cov_ratio: 2e-4, share of the call's tokens, at least one token.
        ppo_kl_coef: 1.0.
    """

    kl_cov_ratio: float = 2e-4
    ppo_kl_coef: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "kl_cov_ratio", 0.0, 1.0, open_low=True)
        require_range(self, "ppo_kl_coef", 0.0, math.inf)

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        logp, advantage = policy_logp(stats), advantages(batch)
        drift = difference(logp, old_logp(logp, batch))
        covariance = torch.where(batch.loss_tokens(), _covariance(logp, advantage, batch), -torch.inf)
        largest = _first(-covariance) < _share(self.kl_cov_ratio, batch)
        return -self.ratio(logp, batch) * advantage + torch.where(largest, self.ppo_kl_coef * drift.abs(), 0.0)


def _covariance(logp: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    """The token's share of the covariance of advantage and log-prob over the call, detached, (N,)."""
    count = batch.lengths.sum().clamp_min(1)
    # a log-prob of -inf would make every mean so
    logp = logp.detach().clamp_min(-HUGE)
    return (advantage - batch.sum_tokens(advantage) / count) * (logp - batch.sum_tokens(logp) / count)


def _share(ratio: float, batch: Batch) -> Tensor:
    # 0.29 times 100 is 29, to rounding
    return (batch.lengths.sum().double() * ratio + 1e-9).floor().clamp_min(1)


def _first(values: Tensor) -> Tensor:
    """The place of each value in ascending order, (N,)."""
    return values.argsort(stable=True).argsort()
