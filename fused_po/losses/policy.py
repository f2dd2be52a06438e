"""Policy losses on tokens with advantages, and supervised fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import Loss, register
from fused_po.losses.terms import entropy_bonus, importance_ratio, k3, policy_logp, require_range
from fused_po.stats import Stats

__all__ = ["Dapo", "Ppo", "Sft"]


@dataclass(frozen=True)
class ClippedLoss(Loss):
    """Base: the clipped surrogate ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` per token, mean over the
    call's tokens.

    r = pi / pi_old, clamped to e^+-80; A is ``advantage``.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epsilon", "beta"):
            require_range(self, name, 0.0, math.inf)
        if self.epsilon_high is not None:
            require_range(self, "epsilon_high", 0.0, math.inf)

    @property
    def horizon(self) -> str:
        return "token"

    @property
    def needs(self) -> frozenset[str]:
        needs = {"logp", "old_logp", "advantage", "importance_weight", "row_weight"}
        if self.beta != 0.0:
            needs.add("ref_logp")
        if self.entropy_coef != 0.0:
            needs.add("entropy")
        return frozenset(needs)

    @property
    def differentiates(self) -> tuple[str, ...]:
        return ("logp", "entropy") if self.entropy_coef != 0.0 else ("logp",)

    def bounds(self) -> tuple[float, float]:
        """The ratios between which the surrogate is not clipped."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1.0 - self.epsilon, 1.0 + high

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """The loss per token: (N,), (N,) -> (N,)."""
        return -torch.minimum(ratio * advantage, ratio.clamp(*self.bounds()) * advantage)

    def kl(self, stats: Stats, batch: Batch) -> Tensor:
        """The KL penalty per token, (N,)."""
        reference = batch.token("ref_logp")
        assert reference is not None
        return k3(policy_logp(stats), reference)

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        advantage = batch.token("advantage")
        assert advantage is not None
        ratio = importance_ratio(policy_logp(stats), batch.token("old_logp"))
        per_token = self.surrogate(ratio, advantage)
        importance, row_weight = batch.token("importance_weight"), batch.token("row_weight")
        if importance is not None:
            per_token = per_token * importance
        if row_weight is not None:
            per_token = per_token * row_weight
        terms = {"policy": batch.mean_tokens(per_token)}
        if self.beta != 0.0:
            terms["kl"] = self.beta * batch.mean_tokens(self.kl(stats, batch))
        if self.entropy_coef != 0.0:
            terms["entropy"] = entropy_bonus(stats, batch, self.entropy_coef)
        return terms

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        advantage = batch.token("advantage")
        assert advantage is not None
        ratio = importance_ratio(policy_logp(stats), batch.token("old_logp"))
        low, high = self.bounds()
        below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
        found = {
            "clip_ratio/low_mean": _mean(below, batch),
            "clip_ratio/high_mean": _mean(above, batch),
            "clip_ratio/region_mean": _mean(below | above, batch),
        }
        if self.beta != 0.0:
            found["kl"] = _mean(self.kl(stats, batch), batch)
        if self.entropy_coef != 0.0:
            assert stats.entropy is not None
            found["entropy"] = _mean(stats.entropy, batch)
        return found


@register("ppo")
@dataclass(frozen=True)
class Ppo(ClippedLoss):
    """PPO's clipped surrogate (Schulman et al., arXiv 1707.06347, eq. 7), mean over tokens; with ``dual_clip`` that
    of Ye et al. (arXiv 1912.09729, eq. 5).

    Side inputs: ``advantage`` (B,) or per token; ``old_logp`` per token (omitted: the current log-probs, detached);
    ``ref_logp`` per token where ``beta`` is not 0; ``importance_weight``, ``row_weight`` multiply the surrogate.

    Args:
        epsilon: 0.2, lower clip range.
        epsilon_high: upper clip range; None takes ``epsilon``.
        beta: 0.0, weight of the KL penalty k3 to the reference.
        entropy_coef: 0.0, weight of the entropy bonus.
        dual_clip: bound > 1 on the ratio where the advantage is negative (verl: 3.0); None: no bound.
    """

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None:
            require_range(self, "dual_clip", 1.0, math.inf, open_low=True)

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        loss = super().surrogate(ratio, advantage)
        if self.dual_clip is None:
            return loss
        return torch.where(advantage < 0, torch.minimum(loss, -self.dual_clip * advantage), loss)


@register("dapo")
@dataclass(frozen=True)
class Dapo(ClippedLoss):
    """DAPO's token-level GRPO loss (Yu et al., arXiv 2503.14476, eq. 8), TRL's ``loss_type="dapo"``: sum over tokens
    / ``num_items``.

    Side inputs as for ``ppo``.

    Args:
        epsilon: 0.2.
        epsilon_high: None takes ``epsilon`` (the paper: 0.28).
        beta: 0.0, weight of the KL penalty k3.
        entropy_coef: 0.0.
        delta: upper bound of the unclipped ratio (two-sided clipping, arXiv 2505.07291); None: no bound.
        use_bias_correction_kl: True as in TRL since 1.10: the KL penalty is multiplied by the ratio.
    """

    delta: float | None = None
    use_bias_correction_kl: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta is not None:
            require_range(self, "delta", 0.0, math.inf, open_low=True)

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        return -torch.minimum(bounded * advantage, ratio.clamp(*self.bounds()) * advantage)

    def kl(self, stats: Stats, batch: Batch) -> Tensor:
        kl = super().kl(stats, batch)
        if not self.use_bias_correction_kl:
            return kl
        return kl * importance_ratio(policy_logp(stats), batch.token("old_logp"))


@register("sft")
@dataclass(frozen=True)
class Sft(Loss):
    """Supervised fine-tuning: the mean negative log-likelihood of the call's loss tokens.

    Args:
        paired: False. True: the batch holds pairs and only the chosen half is learned (TRL's DPO ``loss_type="sft"``).
    """

    paired: bool = False

    @property
    def horizon(self) -> str:
        return "token"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "row_weight"})

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        loss = -policy_logp(stats)
        row_weight = batch.token("row_weight")
        if row_weight is not None:
            loss = loss * row_weight
        if not self.paired:
            return {"nll": batch.mean_tokens(loss)}
        return {"nll": batch.sum_tokens(torch.where(batch.chosen, loss, 0.0)) / batch.num_chosen_tokens}


def _mean(values: Tensor, batch: Batch) -> Tensor:
    """Mean over the loss tokens at hand, which is what TRL logs, whatever normalises the loss."""
    return batch.sum_tokens(values) / batch.lengths.sum().clamp_min(1)
