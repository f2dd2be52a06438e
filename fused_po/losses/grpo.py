"""GRPO and its relatives as TRL's ``GRPOTrainer`` computes them: one base, eight ``loss_type``s, GSPO and GMPO.

r is the importance ratio, of a token or the geometric mean over its sequence, by ``importance_sampling_level``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.metrics import sequence_means, token_mean
from fused_po.losses.policy import ClippedLoss
from fused_po.losses.registry import register
from fused_po.losses.terms import (
    MAX_LOG_RATIO,
    advantages,
    bounded,
    choose,
    clipped_surrogate,
    difference,
    kl_penalty,
    log_ratio,
    old_logp,
    policy_logp,
    reinforce,
    require_choice,
    require_range,
    times_ratio,
    weighted_kl,
)
from fused_po.stats import Stats

__all__ = ["Bnpo", "Cispo", "Dapo", "DrGrpo", "Gmpo", "Grpo", "Gspo", "GspoToken", "Luspo", "Sapo", "Vespo"]

LEVELS = ("token", "sequence")
# TRL's bounds of the sequence ratio in VESPO
LOG_WEIGHT_LOW, LOG_WEIGHT_HIGH = math.log(1e-8), 20.0


@dataclass(frozen=True)
class GrpoLoss(ClippedLoss):
    """Base: two-sided clipping, ratios per token or per sequence.

    Args:
        beta: 0.0, weight of the KL penalty.
        epsilon: 0.2.
        epsilon_high: None takes ``epsilon``.
        delta: upper bound of the unclipped ratio (two-sided clipping, arXiv 2505.07291); None: no bound.
        importance_sampling_level: ``token``, or ``sequence``: r is the geometric mean over the sequence (GSPO).
        use_bias_correction_kl: True as in TRL since 1.10 (False before): the KL penalty is multiplied by r. Where the
            policy, the reference or the sampler gives the token no probability, or r lies above e^80, the sample says
            nothing about the KL, and the penalty is 0.
    """

    delta: float | None = None
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "importance_sampling_level", LEVELS)
        if self.delta is not None:
            require_range(self, "delta", 0.0, math.inf, open_low=True)

    @property
    def own_horizon(self) -> str:
        return self.importance_sampling_level

    def log_weight(self, logp: Tensor, batch: Batch) -> Tensor:
        """log r per token, (N,)."""
        drift = difference(logp, old_logp(logp, batch))
        return drift if self.importance_sampling_level == "token" else batch.spread(batch.mean_per_sequence(drift))

    def ratio(self, logp: Tensor, batch: Batch) -> Tensor:
        if self.importance_sampling_level == "token":
            return super().ratio(logp, batch)
        return bounded(self.log_weight(logp, batch), MAX_LOG_RATIO).exp()

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        ceiling = math.inf if self.delta is None else self.delta
        return clipped_surrogate(self.ratio(policy_logp(stats), batch), advantages(batch), *self.bounds, ceiling)

    def kl(self, stats: Stats, batch: Batch) -> Tensor:
        if not self.use_bias_correction_kl:
            return super().kl(stats, batch)
        logp, reference = policy_logp(stats), batch.token("ref_logp")
        assert reference is not None
        return self.weighted_kl(logp, reference, batch)

    def weighted_kl(self, logp: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """The KL penalty times r per token, 0 where r lies above e^80: (N,), (N,) -> (N,)."""
        if self.importance_sampling_level == "token":
            return weighted_kl(logp, reference, old_logp(logp, batch), self.kl_estimator)
        return times_ratio(kl_penalty(logp, reference, self.kl_estimator), self.log_weight(logp, batch))

    @property
    def ratio_per_sequence(self) -> bool:
        return self.importance_sampling_level == "sequence"

    def clipped(self, logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.delta is None:
            return super().clipped(logp, batch)
        # TRL counts after the bound, which hides all above where it lies below 1 + epsilon_high
        below, above = super().clipped(logp, batch)
        return below, above & (self.delta > self.bounds[1])


@register("grpo")
@dataclass(frozen=True)
class Grpo(GrpoLoss):
    """GRPO: ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``, mean over sequences of token means (Shao et al.,
    arXiv 2402.03300, eq. 3).
    """

    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        return batch.mean_token_means(values)


@register("bnpo")
@dataclass(frozen=True)
class Bnpo(GrpoLoss):
    """GRPO's surrogate ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``, mean over the tokens of the call (TRL's
    ``bnpo``; Xiao et al., arXiv 2506.02864).

    ``num_items`` does not count here, nor for the entropy bonus: gradient accumulation averages the means of its calls,
    so micro-batches of different lengths do not add up to the full batch. ``dapo`` is the loss that does.
    """

    @property
    def not_additive(self) -> str | None:
        return "its mean is over the tokens of one call, by definition"

    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        return batch.mean_call_tokens(values)

    def mean_entropy(self, entropy: Tensor, batch: Batch) -> Tensor:
        return batch.mean_call_tokens(entropy)


@register("dr_grpo")
@dataclass(frozen=True)
class DrGrpo(GrpoLoss):
    """Dr. GRPO: ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``, sum over sequences *
    ``max_completion_length`` (Liu et al., arXiv 2503.20783).

    Its advantages are not divided by a standard deviation: ``fused_po.advantages.group_relative(scale="none")``.

    Args:
        max_completion_length: 256, TRL's default; the length that completions are cut at.
    """

    max_completion_length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "max_completion_length", 1, math.inf)

    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        return batch.mean_token_sums(values) / self.max_completion_length


@dataclass(frozen=True)
class TokenMeanLoss(GrpoLoss):
    """Base: sum over tokens / ``num_items``."""

    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        return batch.mean_tokens(values)


@register("dapo")
@dataclass(frozen=True)
class Dapo(TokenMeanLoss):
    """DAPO: ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``, sum over tokens / ``num_items`` (Yu et al., arXiv
    2503.14476, eq. 8). TRL's default.

    The paper's ``epsilon_high`` is 0.28.
    """


@register("luspo")
@dataclass(frozen=True)
class Luspo(GrpoLoss):
    """LUSPO: ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``, mean over sequences of token sums (arXiv
    2602.05261).

    Meant for ``importance_sampling_level="sequence"``; the default is TRL's, ``token``.
    """

    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        return batch.mean_token_sums(values)


@register("cispo")
@dataclass(frozen=True)
class Cispo(TokenMeanLoss):
    """CISPO as TRL has it: ``-stopgrad(min(r, epsilon_high)) A log pi``, sum over tokens / ``num_items`` (MiniMax-M1,
    arXiv 2506.13585).

    ``cispo_verl`` clips r on both sides, around 1.

    Args:
        epsilon_high: the cap of the ratio itself, not its distance from 1; None takes ``epsilon``, as in TRL, which is
            rarely meant (ScaleRL: 5.0).
    """

    @property
    def cap(self) -> float:
        """The largest weight."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        logp = policy_logp(stats)
        return reinforce(self.ratio(logp, batch).clamp(max=self.cap), logp, batch)

    def clip_metrics(self, logp: Tensor, batch: Batch) -> dict[str, Tensor]:
        above = ((self.ratio(logp, batch) > self.cap) & (advantages(batch) > 0)).double()
        share = sequence_means(above, batch).nanmean() if self.counts_sequences(batch) else token_mean(above, batch)
        return {"cispo_clip_ratio": share}


@register("sapo")
@dataclass(frozen=True)
class Sapo(GrpoLoss):
    """SAPO, a soft gate for the clip: ``-(4 / tau) sigmoid(tau (r - 1)) A``, mean over sequences of token means (arXiv
    2511.20347).

    Args:
        sapo_temperature_pos: tau > 0 where A > 0, 1.0.
        sapo_temperature_neg: tau > 0 elsewhere, 1.05.
    """

    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            require_range(self, name, 0.0, math.inf, open_low=True)

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        advantage = advantages(batch)
        tau = choose(advantage > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
        return -torch.sigmoid(tau * (self.ratio(policy_logp(stats), batch) - 1.0)) * 4.0 / tau * advantage

    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        return batch.mean_token_means(values)

    def clip_metrics(self, logp: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {}


@register("vespo")
@dataclass(frozen=True)
class Vespo(TokenMeanLoss):
    """VESPO: ``-phi(w) A log pi, phi = e^{lambda + k log w - lambda w}`` with w the detached ratio of the whole
    sequence, sum over tokens / ``num_items`` (arXiv 2602.10693).

    ``importance_weight`` per token belongs to w and does not multiply the loss. Log-ratios are clamped to +-20 per
    token, log w to [log 1e-8, 20], as in TRL.

    Args:
        vespo_k_pos: k where A >= 0, 2.0.
        vespo_lambda_pos: lambda where A >= 0, 3.0.
        vespo_k_neg: k elsewhere, 3.0.
        vespo_lambda_neg: lambda elsewhere, 2.0.
    """

    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    multipliers: ClassVar[tuple[str, ...]] = ("row_weight",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            require_range(self, name, 0.0, math.inf)

    @property
    def own_horizon(self) -> str:
        return "sequence"

    def phi(self, logp: Tensor, batch: Batch) -> Tensor:
        """The weight of each token, (N,), detached."""
        drift = bounded(difference(logp, old_logp(logp, batch)), LOG_WEIGHT_HIGH).detach()
        log_weight = batch.sum_per_sequence(drift)  # (B,)
        importance = batch.token("importance_weight")
        if importance is not None:
            log_importance = importance.double().log().clamp(LOG_WEIGHT_LOW, LOG_WEIGHT_HIGH)
            log_weight = log_weight + batch.sum_per_sequence(log_importance)
        log_weight = batch.spread(log_weight.clamp(LOG_WEIGHT_LOW, LOG_WEIGHT_HIGH))
        up = advantages(batch) >= 0
        k = choose(up, self.vespo_k_pos, self.vespo_k_neg)
        scale = choose(up, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp_min(1e-4)
        return torch.exp(scale + k * log_weight - scale * log_weight.exp()).nan_to_num(nan=0.0, posinf=0.0)

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        logp = policy_logp(stats)
        return reinforce(self.phi(logp, batch), logp, batch)

    def clip_metrics(self, logp: Tensor, batch: Batch) -> dict[str, Tensor]:
        phi = self.phi(logp, batch)
        per_sequence = "advantage" in batch.per_sequence
        return {"vespo/phi_seq_mean": sequence_means(phi, batch).nanmean() if per_sequence else token_mean(phi, batch)}


@register("gspo")
@dataclass(frozen=True)
class Gspo(Grpo):
    """GSPO: ``-min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A)`` with s the geometric mean of the sequence's
    ratios, mean over sequences (Zheng et al., arXiv 2507.18071).

    The same as ``grpo`` with ``importance_sampling_level="sequence"``, and the paper's clip range.

    Args:
        epsilon: 3e-4.
        epsilon_high: 4e-4.
    """

    epsilon: float = 3e-4
    epsilon_high: float | None = 4e-4
    importance_sampling_level: str = "sequence"


@register("gspo_token")
@dataclass(frozen=True)
class GspoToken(Gspo):
    """GSPO-token, verl's ``gspo``: ``-min(s_t A_t, clip(s_t, 1 - epsilon, 1 + epsilon_high) A_t), s_t = stopgrad(s) pi
    / stopgrad(pi)`` (Zheng et al., arXiv 2507.18071).

    Equal to ``gspo`` where all tokens of a sequence share one advantage and none is clipped apart.
    """

    def ratio(self, logp: Tensor, batch: Batch) -> Tensor:
        shared = self.log_weight(logp, batch).detach()
        return bounded(shared + difference(logp, logp.detach()), MAX_LOG_RATIO).exp()

    def weighted_kl(self, logp: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        own = weighted_kl(logp, reference, logp.detach(), self.kl_estimator)
        return times_ratio(own, self.log_weight(logp, batch).detach())


@register("gmpo")
@dataclass(frozen=True)
class Gmpo(Grpo):
    """GMPO: ``-A exp(mean_t clip(log r_t))``, clipped on the side that A drives to, mean over sequences (Zhao et al.,
    arXiv 2507.20673).

    As TRL's ``GMPOTrainer`` and verl's ``geo_mean``; A per token is averaged over the sequence, as in verl. With
    ``top_entropy_quantile`` the other tokens leave the geometric mean.

    Args:
        epsilon: 0.4, clip range of the log-ratio: ratios in [e^-epsilon, e^epsilon_high].
        epsilon_high: likewise, default ``epsilon``.
        use_bias_correction_kl: False, as in TRL.
    """

    epsilon: float = 0.4
    use_bias_correction_kl: bool = False

    @property
    def own_horizon(self) -> str:
        return "sequence"

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        logp, advantage = policy_logp(stats), advantages(batch)
        drift = difference(logp, old_logp(logp, batch))  # (N,)
        # one side only: where A > 0 the ratio may fall freely
        clipped = torch.where(advantage > 0, drift.clamp(max=self.upper), drift.clamp(min=-self.epsilon))
        kept = self.high_entropy(stats, batch)
        kept = batch.loss_tokens() if kept is None else kept
        total = batch.sum_per_sequence(torch.where(kept, clipped, 0.0))  # (B,)
        log_weight = total / batch.sum_per_sequence(kept).clamp_min(1)
        ratio = log_ratio(log_weight, torch.zeros_like(log_weight)).exp()
        return -batch.spread(ratio * batch.mean_per_sequence(advantage))

    def masks(self, stats: Stats, batch: Batch) -> tuple[Tensor | None, ...]:
        return (self.on_policy(stats, batch),)

    def clipped(self, logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        drift, advantage = difference(logp, old_logp(logp, batch)), advantages(batch)
        return (drift < -self.epsilon) & (advantage < 0), (drift > self.upper) & (advantage > 0)
