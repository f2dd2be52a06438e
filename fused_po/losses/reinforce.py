"""Policy gradients on log pi with detached weights, and REINFORCE with one ratio per sequence (RLOO)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.policy import Aggregated, ClippedLoss, PolicyLoss
from fused_po.losses.registry import register
from fused_po.losses.terms import (
    advantages,
    choose,
    difference,
    log_ratio,
    old_logp,
    policy_logp,
    reinforce,
    require_range,
)
from fused_po.stats import Stats

__all__ = ["Aspo", "AsymRE", "CispoVerl", "Gpg", "Nsr", "Psr", "Rloo", "Topr", "WReinforce"]


@dataclass(frozen=True)
class ReinforceLoss(Aggregated, PolicyLoss):
    """Base: ``-stopgrad(w) A log pi`` per token."""

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        logp = policy_logp(stats)
        return reinforce(self.ratio_weight(logp, batch), logp, batch)

    @abstractmethod
    def ratio_weight(self, logp: Tensor, batch: Batch) -> Tensor:
        """w per token, (N,)."""


@dataclass(frozen=True)
class OnPolicyLoss(ReinforceLoss):
    """Base: no importance ratio, so ``old_logp`` is not read."""

    reads_old_logp: ClassVar[bool] = False

    def ratio_weight(self, logp: Tensor, batch: Batch) -> Tensor:
        return torch.ones_like(logp)


@register("gpg")
@dataclass(frozen=True)
class Gpg(OnPolicyLoss):
    """GPG, the plain policy gradient: ``-A log pi``, mean over tokens (Chu et al., arXiv 2504.02546)."""


@register("asymre")
@dataclass(frozen=True)
class AsymRE(OnPolicyLoss):
    """AsymRE, off-policy REINFORCE with a lowered baseline: ``-(A - delta_v) log pi``, mean over sequences of token
    sums (Arnal et al., arXiv 2506.20520).

    ``advantage`` is the reward minus the mean reward, so that the baseline is that mean plus ``delta_v``.

    Args:
        delta_v: -0.1; below 0 learning leans on successes.
    """

    delta_v: float = -0.1
    loss_agg_mode: str = "seq-mean-token-sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "delta_v", -math.inf, math.inf, open_low=True, open_high=True)

    def factors(self, batch: Batch) -> list[Tensor]:
        return [advantages(batch) - self.delta_v, *super().factors(batch)[1:]]

    def role(self, batch: Batch) -> Tensor:
        return (advantages(batch) - self.delta_v).sign()

    def weight(self, c: Tensor, batch: Batch) -> Tensor:
        return (advantages(batch) - self.delta_v).abs()

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        logp = policy_logp(stats)
        return reinforce(self.ratio_weight(logp, batch), logp, batch, shift=self.delta_v)


@register("w_reinforce")
@dataclass(frozen=True)
class WReinforce(OnPolicyLoss):
    """W-REINFORCE: ``-positive log pi`` on correct answers, ``negative log pi`` on the others, mean over tokens (Zhu et
    al., arXiv 2506.01347).

    Correct are the tokens with ``advantage`` > 0 (a reward of +1), incorrect those below 0; its size does not count.

    Args:
        positive: 0.1, lambda in the paper.
        negative: 1.0.
    """

    positive: float = 0.1
    negative: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positive", "negative"):
            require_range(self, name, 0.0, math.inf)

    def factors(self, batch: Batch) -> list[Tensor]:
        return [self._size(batch), *super().factors(batch)]

    def ratio_weight(self, logp: Tensor, batch: Batch) -> Tensor:
        advantage = advantages(batch)
        return torch.where(advantage == 0, 0.0, self._size(batch) / advantage.abs())

    def _size(self, batch: Batch) -> Tensor:
        return choose(advantages(batch) > 0, self.positive, self.negative)


@register("psr")
@dataclass(frozen=True)
class Psr(WReinforce):
    """PSR, positive sample reinforcement: ``-log pi`` on correct answers, nothing on the others (Zhu et al., arXiv
    2506.01347)."""

    positive: float = 1.0
    negative: float = 0.0


@register("nsr")
@dataclass(frozen=True)
class Nsr(WReinforce):
    """NSR, negative sample reinforcement: ``log pi`` on incorrect answers, nothing on the others (Zhu et al., arXiv
    2506.01347)."""

    positive: float = 0.0
    negative: float = 1.0


@register("topr")
@dataclass(frozen=True)
class Topr(ReinforceLoss):
    """TOPR: ``-A log pi`` where A >= 0, ``-min(R, 1) A log pi`` elsewhere with R the detached ratio of the whole
    sequence, mean over sequences of token sums (Le Roux et al., arXiv 2503.14286).
    """

    loss_agg_mode: str = "seq-mean-token-sum"

    @property
    def own_horizon(self) -> str:
        return "sequence"

    def ratio_weight(self, logp: Tensor, batch: Batch) -> Tensor:
        log_weight = batch.sum_per_sequence(difference(logp, old_logp(logp, batch)))  # (B,)
        return torch.where(advantages(batch) >= 0, 1.0, batch.spread(log_weight.clamp(max=0.0).exp()))


@dataclass(frozen=True)
class RatioLoss(Aggregated, ClippedLoss):
    """Base: ``-stopgrad(w) A log pi`` per token with w made of the ratio of the token."""

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        logp = policy_logp(stats)
        return reinforce(self.ratio_weight(self.ratio(logp, batch), batch), logp, batch)

    @abstractmethod
    def ratio_weight(self, ratio: Tensor, batch: Batch) -> Tensor:
        """w per token, (N,)."""


@register("cispo_verl")
@dataclass(frozen=True)
class CispoVerl(RatioLoss):
    """CISPO as verl has it: ``-stopgrad(clip(r, 1 - epsilon, 1 + epsilon_high)) A log pi``, mean over tokens
    (MiniMax-M1, arXiv 2506.13585).

    TRL's ``cispo`` clips above only, at ``epsilon_high`` itself.
    """

    def ratio_weight(self, ratio: Tensor, batch: Batch) -> Tensor:
        return ratio.clamp(*self.bounds)


@register("aspo")
@dataclass(frozen=True)
class Aspo(RatioLoss):
    """ASPO, which turns the ratio over where A > 0: ``-stopgrad(min(w, dual_clip)) A log pi, w = 1 / r`` where A > 0,
    r elsewhere, and 0 where PPO would clip, mean over tokens (Wang et al., arXiv 2510.06062).

    The bound on w is soft: it keeps the gradient. From the paper's abstract and its definition of the ratio; details
    of its published code are not claimed.

    Args:
        dual_clip: 3.0, > 1.
    """

    dual_clip: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "dual_clip", 1.0, math.inf, open_low=True)

    def ratio_weight(self, ratio: Tensor, batch: Batch) -> Tensor:
        low, high = self.bounds
        advantage = advantages(batch)
        off = torch.where(advantage > 0, ratio > high, ratio < low)
        weight = torch.where(advantage > 0, ratio.reciprocal(), ratio).clamp(max=self.dual_clip)
        return torch.where(off, 0.0, weight)


@register("rloo")
@dataclass(frozen=True)
class Rloo(ClippedLoss):
    """RLOO: ``-min(R A, clip(R, 1 - epsilon, 1 + epsilon_high) A)`` with R the ratio of the whole sequence, mean over
    sequences (Ahmadian et al., arXiv 2402.14740; TRL's ``RLOOTrainer``).

    Its KL penalty is part of the reward, and its advantage ``fused_po.advantages.leave_one_out``. ``old_logp`` may be
    the sum per sequence.
    """

    @property
    def own_horizon(self) -> str:
        return "sequence"

    @property
    def ratio_per_sequence(self) -> bool:
        return True

    def ratio(self, logp: Tensor, batch: Batch) -> Tensor:
        total = batch.sum_per_sequence(logp)  # (B,)
        old = batch.sequence("old_logp")
        return batch.spread(log_ratio(total, total.detach() if old is None else old).exp())

    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        return batch.mean_token_means(values)
