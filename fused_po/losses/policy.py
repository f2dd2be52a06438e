"""Losses on tokens with advantages: what they share, and PPO."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import Loss
from fused_po.losses.metrics import clip_metrics, entropy_metric, token_mean
from fused_po.losses.registry import register
from fused_po.losses.terms import (
    KL_ESTIMATORS,
    advantages,
    clipped_surrogate,
    difference,
    kl_penalty,
    log_ratio,
    old_logp,
    policy_logp,
    quantile,
    require_choice,
    require_range,
    weighted,
)
from fused_po.stats import Stats

__all__ = ["ClippedLoss", "PolicyLoss", "Ppo", "ReinforcePlusPlus"]

AGGREGATIONS = {
    "token-mean": Batch.mean_tokens,
    "seq-mean-token-mean": Batch.mean_token_means,
    "seq-mean-token-sum": Batch.mean_token_sums,
}


@dataclass(frozen=True)
class PolicyLoss(Loss):
    """Base: a surrogate per token, weighted, then a KL penalty and an entropy bonus.

    r = pi / pi_old; A is ``advantage``. Beyond e^+-80 r is constant, so a token that the sampler gives no probability
    (``old_logp`` of -inf, outside its top k) has a finite loss and no gradient.

    Side inputs: ``advantage`` (B,) or per token; ``old_logp`` per token, optional: the current log-probs, detached;
    ``ref_logp`` per token where ``beta`` is not 0; ``importance_weight`` and ``row_weight``, optional, multiply the
    surrogate; ``sampling_logp`` per token, optional, the sampler's log-probs for the off-policy mask (else
    ``old_logp``).

    Args:
        beta: 0.0, weight of the KL penalty to the reference.
        kl_estimator: with x = log pi_ref - log pi, ``k3``: e^x - 1 - x, constant where x lies above 80; ``k1``: -x
            (whose gradient does not depend on the reference); ``k2``: x^2 / 2. An infinite x counts as +-1e15.
        entropy_coef: 0.0, weight of the mean entropy over the loss tokens, ``num_items`` of them (over those that
            ``top_entropy_quantile`` keeps).
        top_entropy_quantile: 1.0; below, only that share of the call's tokens with the highest entropy carries the
            surrogate (Wang et al., arXiv 2506.01939), and the horizon is the batch: micro-batches, each with a quantile
            of its own, do not add up to the full batch.
        off_policy_mask_threshold: None; else tokens with a negative advantage are dropped where the mean of log
            pi_sampling
            - log pi over their sequence lies above it (DeepSeek-V3.2, arXiv 2512.02556), and the horizon is the
                sequence.
    """

    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None

    weighs_sequences: ClassVar[bool] = False
    reads_old_logp: ClassVar[bool] = True
    # side inputs that multiply the surrogate
    multipliers: ClassVar[tuple[str, ...]] = ("importance_weight", "row_weight")

    def __post_init__(self) -> None:
        require_range(self, "beta", 0.0, math.inf)
        require_range(self, "entropy_coef", -math.inf, math.inf, open_low=True, open_high=True)
        require_range(self, "top_entropy_quantile", 0.0, 1.0)
        require_choice(self, "kl_estimator", KL_ESTIMATORS)
        if self.off_policy_mask_threshold is not None:
            require_range(self, "off_policy_mask_threshold", -math.inf, math.inf)

    @property
    def own_horizon(self) -> str:
        """The horizon of the surrogate alone."""
        return "token"

    @property
    def horizon(self) -> str:
        if self.top_entropy_quantile < 1.0:
            return "batch"
        return "sequence" if self.off_policy_mask_threshold is not None else self.own_horizon

    @property
    def needs(self) -> frozenset[str]:
        needs = {"logp", "advantage", "importance_weight", "row_weight"}
        if self.reads_old_logp:
            needs.add("old_logp")
        if self.beta != 0.0:
            needs.add("ref_logp")
        if self.entropy_coef != 0.0 or self.top_entropy_quantile < 1.0:
            needs.add("entropy")
        if self.off_policy_mask_threshold is not None:
            needs.add("sampling_logp")
        return frozenset(needs)

    @property
    def reports(self) -> tuple[str, ...]:
        return ("entropy",)

    @property
    def differentiates(self) -> tuple[str, ...]:
        return ("logp", "entropy") if self.entropy_coef != 0.0 else ("logp",)

    @property
    def has_unsided_terms(self) -> bool:
        return self.beta != 0.0 or self.entropy_coef != 0.0

    def silent(self, batch: Batch) -> Tensor | None:
        """Rows whose advantage or another factor is 0, over whole sequences where these are the horizon."""
        if self.has_unsided_terms or self.own_horizon not in ("token", "sequence"):
            return None
        found = None
        for factor in self.factors(batch):
            zero = factor == 0
            if self.own_horizon == "sequence":
                zero = batch.spread(batch.sum_per_sequence(~zero) == 0)
            found = zero if found is None else found | zero
        return found

    def factors(self, batch: Batch) -> list[Tensor]:
        """(N,) each: the surrogate is a product of them and of what the policy says."""
        weights = [batch.token(name) for name in self.multipliers]
        return [advantages(batch), *(weight for weight in weights if weight is not None)]

    def role(self, batch: Batch) -> Tensor:
        return advantages(batch).sign()

    def weight(self, c: Tensor, batch: Batch) -> Tensor:
        """|A|."""
        return advantages(batch).abs()

    @abstractmethod
    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        """The loss per token, (N,)."""

    @abstractmethod
    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        """This batch's share of the loss from values per token: (N,) -> ()."""

    def kl(self, stats: Stats, batch: Batch) -> Tensor:
        """The KL penalty per token, (N,)."""
        reference = batch.token("ref_logp")
        assert reference is not None
        return kl_penalty(policy_logp(stats), reference, self.kl_estimator)

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        terms = {"policy": self._policy(stats, batch)}
        if self.beta != 0.0:
            terms["kl"] = self.beta * self.aggregate(self.kl(stats, batch), batch)
        if self.entropy_coef != 0.0:
            assert stats.entropy is not None
            terms["entropy"] = -self.entropy_coef * self._entropy(stats.entropy, batch)
        return terms

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        found = entropy_metric(stats, batch)
        if self.beta != 0.0:
            found["kl"] = token_mean(self.kl(stats, batch), batch)
        if self.entropy_coef != 0.0:
            terms = self(stats, batch)
            found["policy_loss"] = terms["policy"] + terms.get("kl", 0.0)
            found["entropy_coef"] = torch.full_like(found["entropy"], self.entropy_coef)
        return found

    def _policy(self, stats: Stats, batch: Batch) -> Tensor:
        loss = self.surrogate(stats, batch)
        for mask in self.masks(stats, batch):
            if mask is not None:
                loss = torch.where(mask, loss, 0.0)
        for name in self.multipliers:
            weight = batch.token(name)
            if weight is not None:
                loss = weighted(loss, weight)
        return self.aggregate(loss, batch)

    def masks(self, stats: Stats, batch: Batch) -> tuple[Tensor | None, ...]:
        """(N,) bool each: tokens that keep their surrogate; None: all."""
        return self.on_policy(stats, batch), self.high_entropy(stats, batch)

    def on_policy(self, stats: Stats, batch: Batch) -> Tensor | None:
        """(N,) bool, the tokens that ``off_policy_mask_threshold`` keeps; None: all."""
        if self.off_policy_mask_threshold is None:
            return None
        logp = policy_logp(stats)
        sampling = batch.token("sampling_logp")
        sampling = old_logp(logp, batch) if sampling is None else sampling
        # a token that the sampler could not score is no evidence
        drift = difference(sampling, logp.detach()).nan_to_num(nan=0.0)  # (N,)
        near = batch.mean_per_sequence(drift) <= self.off_policy_mask_threshold
        return (advantages(batch) >= 0) | batch.spread(near)

    def high_entropy(self, stats: Stats, batch: Batch) -> Tensor | None:
        """(N,) bool, the tokens that ``top_entropy_quantile`` keeps; None: all."""
        if self.top_entropy_quantile >= 1.0:
            return None
        assert stats.entropy is not None
        # an interpolated bound between two values an ulp apart must not fall on one of them
        entropy = stats.entropy.detach().double()
        tokens = batch.loss_tokens()
        return tokens & (entropy >= quantile(entropy, tokens, 1.0 - self.top_entropy_quantile))

    def mean_entropy(self, entropy: Tensor, batch: Batch) -> Tensor:
        """This batch's share of the mean over the loss tokens: (N,) -> ()."""
        return batch.mean_tokens(entropy)

    def _entropy(self, entropy: Tensor, batch: Batch) -> Tensor:
        mask = self.high_entropy(Stats(entropy=entropy), batch)
        if mask is None:
            return self.mean_entropy(entropy, batch)
        # the mean over fewer tokens
        share = batch.lengths.sum().double() / mask.sum().clamp_min(1)
        return self.mean_entropy(torch.where(mask, entropy, 0.0), batch) * share


@dataclass(frozen=True)
class ClippedLoss(PolicyLoss):
    """Base: ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` per token."""

    epsilon: float = 0.2
    epsilon_high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "epsilon", 0.0, math.inf)
        if self.epsilon_high is not None:
            require_range(self, "epsilon_high", 0.0, math.inf)

    @property
    def upper(self) -> float:
        """The clip range above."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def bounds(self) -> tuple[float, float]:
        """The ratios between which the surrogate is not clipped."""
        return 1.0 - self.epsilon, 1.0 + self.upper

    @property
    def ratio_per_sequence(self) -> bool:
        """All tokens of a sequence share one ratio."""
        return False

    def ratio(self, logp: Tensor, batch: Batch) -> Tensor:
        """r per token, (N,)."""
        return log_ratio(logp, old_logp(logp, batch)).exp()

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        return clipped_surrogate(self.ratio(policy_logp(stats), batch), advantages(batch), *self.bounds)

    def clipped(self, logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N,) bool each: tokens clipped below and above."""
        ratio, advantage = self.ratio(logp, batch), advantages(batch)
        low, high = self.bounds
        return (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)

    def clip_metrics(self, logp: Tensor, batch: Batch) -> dict[str, Tensor]:
        """How much of the call is clipped."""
        return clip_metrics(*self.clipped(logp, batch), batch, per_sequence=self.counts_sequences(batch))

    def counts_sequences(self, batch: Batch) -> bool:
        """TRL counts sequences where ratio and advantage are one per sequence."""
        return self.ratio_per_sequence and "advantage" in batch.per_sequence

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        return super().metrics(stats, batch) | self.clip_metrics(policy_logp(stats), batch)


@dataclass(frozen=True)
class Aggregated:
    """Mixin: how values per token become a loss is the user's choice, in verl's words.

    Args:
        loss_agg_mode: ``token-mean`` over all loss tokens (``num_items``), ``seq-mean-token-mean`` or
            ``seq-mean-token-sum`` over sequences (``num_sequences``; empty ones count, as in TRL).
    """

    loss_agg_mode: str = "token-mean"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        require_choice(self, "loss_agg_mode", tuple(AGGREGATIONS))

    def aggregate(self, values: Tensor, batch: Batch) -> Tensor:
        """This batch's share of the loss from values per token: (N,) -> ()."""
        return AGGREGATIONS[self.loss_agg_mode](batch, values)


@register("ppo")
@dataclass(frozen=True)
class Ppo(Aggregated, ClippedLoss):
    """PPO: ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)``, mean over tokens (Schulman et al., arXiv
    1707.06347, eq. 7); with ``dual_clip`` c at most -c A where A < 0 (Ye et al., arXiv 1912.09729, eq. 5).

    The clipped loss of a value head is ``fused_po.losses.value_loss``.

    Args:
        epsilon: 0.2, lower clip range.
        epsilon_high: upper clip range; None takes ``epsilon``.
        dual_clip: bound > 1 on the ratio where the advantage is negative (verl: 3.0); None: no bound.
    """

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None:
            require_range(self, "dual_clip", 1.0, math.inf, open_low=True)

    def surrogate(self, stats: Stats, batch: Batch) -> Tensor:
        loss = super().surrogate(stats, batch)
        if self.dual_clip is None:
            return loss
        advantage = advantages(batch)
        return torch.where(advantage < 0, torch.minimum(loss, -self.dual_clip * advantage), loss)


@register("reinforce_plus_plus")
@dataclass(frozen=True)
class ReinforcePlusPlus(Ppo):
    """REINFORCE++: ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` on whitened returns (Hu et al., arXiv
    2501.03262).

    PPO's loss without a critic: what differs is the advantage, ``fused_po.advantages.reinforce_plus_plus``.
    """
