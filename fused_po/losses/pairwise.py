"""Losses on pairs of a chosen and a rejected answer: the bases, and DPO with what is done to its margin.

The first half of the sequences is chosen, the second half rejected. Throughout: a and d are the summed log-probs of
chosen and rejected, u and v their log-ratios to the reference, h = u - v.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import Loss
from fused_po.losses.metrics import pair_metrics, pair_token_metrics
from fused_po.losses.registry import register
from fused_po.losses.terms import (
    bounded_exp,
    bounded_expm1,
    choose,
    difference,
    policy_logp,
    require_choice,
    require_range,
    sigmoid_loss,
    weighted,
)
from fused_po.stats import Stats

__all__ = [
    "Conservative",
    "DiscoPOP",
    "ExoPair",
    "Hinge",
    "Ipo",
    "MarginLoss",
    "PairLoss",
    "ReferenceLoss",
    "Robust",
    "Sigmoid",
    "SigmoidNorm",
]

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# TRL's bound for float32
MAX_ALPHA_EXPONENT = 80.0


@dataclass(frozen=True)
class PairLoss(Loss):
    """Base: each answer has a score, and each pair a loss of its two scores."""

    beta: float = 0.1

    @property
    def horizon(self) -> str:
        return "pair"

    def __post_init__(self) -> None:
        require_range(self, "beta", 0.0, math.inf)

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        value = self.value(*batch.halves(self.scores(stats, batch)))
        weight = self.pair_weight(stats, batch)
        return {"preference": batch.mean_pairs(value if weight is None else value * weight)}

    @abstractmethod
    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        """The score of each answer, (B,)."""

    @abstractmethod
    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair from the scores of its answers: (P,), (P,) -> (P,)."""

    def pair_weight(self, stats: Stats, batch: Batch) -> Tensor | None:
        """A detached weight of each pair, (P,)."""
        return None

    @property
    def length_normalised(self) -> bool:
        """The score of an answer is a mean over its tokens."""
        return False

    def role(self, batch: Batch) -> Tensor:
        return choose(batch.chosen, 1.0, -1.0)

    def weight(self, c: Tensor, batch: Batch) -> Tensor:
        """|dL/d(beta score)| of the pair: sigmoid(-beta h) for DPO."""
        scale = batch.num_pairs / (self.beta or 1.0)
        return c.abs() * scale * (batch.token_lengths if self.length_normalised else 1.0)


@dataclass(frozen=True)
class ReferenceLoss(PairLoss):
    """Base: the score of an answer is its log-ratio to the reference.

    Args:
        beta: 0.1, strength of the reference.
        use_weighting: weight pairs by how likely the policy finds both answers (WPO: Zhou et al., arXiv 2406.11827,
            eq. 2): the product over both of ``exp(mean_t(logp_t - log sum_v p_v^2))``, detached.
        ld_alpha: weight of the tokens beyond the shorter answer of the pair, in [0, 1] (LD-DPO: Liu et al., arXiv
            2409.06411); None: all count. A ``ref_logp`` given per sequence must be the sum with the same weights.
    """

    use_weighting: bool = False
    ld_alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ld_alpha is not None:
            require_range(self, "ld_alpha", 0.0, 1.0)

    @property
    def needs(self) -> frozenset[str]:
        weighting = {"log_sum_sq_probs"} if self.use_weighting else set()
        return frozenset({"logp", "ref_logp"} | weighting) | self.also_needs

    @property
    def reports(self) -> tuple[str, ...]:
        return ("entropy", "mean_logit", "is_top1")

    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        return self.log_ratios(stats, batch)

    def log_ratios(self, stats: Stats, batch: Batch) -> Tensor:
        """Of each answer to the reference, (B,) float64."""
        return difference(self.logps(stats, batch), self.reference_logps(batch))

    def reference_logps(self, batch: Batch) -> Tensor:
        """Summed log-probs of each answer under the reference, (B,) float64."""
        reference = batch.sequence("ref_logp")
        if self.ld_alpha is not None and "ref_logp" in batch.per_token:
            reference = self._summed(batch.per_token["ref_logp"], batch)
        assert reference is not None
        return reference

    def logps(self, stats: Stats, batch: Batch) -> Tensor:
        """Summed log-probs of each answer, (B,) float64."""
        return self._summed(policy_logp(stats), batch)

    def pair_weight(self, stats: Stats, batch: Batch) -> Tensor | None:
        if not self.use_weighting:
            return None
        assert stats.log_sum_sq_probs is not None
        aligned = (policy_logp(stats) - stats.log_sum_sq_probs).detach()  # (N,)
        chosen, rejected = batch.halves(batch.mean_per_sequence(aligned).exp())
        return chosen * rejected

    def token_weight(self, batch: Batch) -> Tensor | None:
        """The weight of each token in the sum of its answer, (N,); None: all 1."""
        if self.ld_alpha is None:
            return None
        shared = torch.minimum(*batch.halves(batch.lengths)).repeat(2)  # (B,)
        return choose(batch.positions() > batch.spread(shared), self.ld_alpha, 1.0)

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        logps = self.logps(stats, batch)
        rewards = self.beta * difference(logps, self.reference_logps(batch))
        return pair_metrics(rewards, logps, batch) | pair_token_metrics(stats, batch)

    def _summed(self, values: Tensor, batch: Batch) -> Tensor:
        weight = self.token_weight(batch)
        return batch.sum_per_sequence(values if weight is None else weighted(values, weight))


@dataclass(frozen=True)
class MarginLoss(ReferenceLoss):
    """Base: a function of the margin between the scores, where a score is a divergence's slope at the log-ratio.

    Args:
        f_divergence_type: s(x) of the log-ratio x (Wang et al., arXiv 2309.16240): ``reverse_kl`` x, ``forward_kl`` 1 -
            e^-x, ``js_divergence`` log 2 + log sigmoid(x), ``alpha_divergence`` (e^{(alpha - 1) x} - 1) / (alpha - 1).
            Exponentials are constant above the largest float32 (alpha: above e^80, as in TRL).
        f_alpha_divergence_coef: alpha, 0.5; 1 is reverse_kl.
    """

    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "f_divergence_type", DIVERGENCES)
        require_range(self, "f_alpha_divergence_coef", -math.inf, math.inf, open_low=True, open_high=True)

    @abstractmethod
    def of_margin(self, margin: Tensor) -> Tensor:
        """The loss of each pair from how far the chosen score lies above the rejected: (P,) -> (P,)."""

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.of_margin(chosen - rejected)

    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        scores = self._divergence(self.log_ratios(stats, batch))
        return scores / batch.lengths.clamp_min(1) if self.length_normalised else scores

    def pattern(self, batch: Batch) -> Tensor | None:
        if not self._reverse_kl:
            return None
        signs = choose(batch.chosen, 1.0, -1.0)
        weight = self.token_weight(batch)
        signs = signs if weight is None else signs * weight
        return signs / batch.token_lengths.clamp_min(1) if self.length_normalised else signs

    @property
    def _reverse_kl(self) -> bool:
        return self.f_divergence_type == "reverse_kl" or (
            self.f_divergence_type == "alpha_divergence" and abs(self.f_alpha_divergence_coef - 1.0) < 1e-6
        )

    def _divergence(self, log_ratios: Tensor) -> Tensor:
        if self._reverse_kl:
            return log_ratios
        if self.f_divergence_type == "forward_kl":
            return -bounded_expm1(-log_ratios)
        if self.f_divergence_type == "js_divergence":
            return math.log(2.0) + F.logsigmoid(log_ratios)
        power = self.f_alpha_divergence_coef - 1.0
        return bounded_expm1(power * log_ratios, MAX_ALPHA_EXPONENT) / power


@register("sigmoid")
@dataclass(frozen=True)
class Sigmoid(MarginLoss):
    """DPO: ``-log sigmoid(beta h)`` (Rafailov et al., arXiv 2305.18290, eq. 7).

    TRL's ``sigmoid`` ignores ``label_smoothing``; ``conservative`` does not.
    """

    def of_margin(self, margin: Tensor) -> Tensor:
        return sigmoid_loss(self.beta * margin)


@register("sigmoid_norm")
@dataclass(frozen=True)
class SigmoidNorm(MarginLoss):
    """DPO on length-normalised log-ratios: ``-log sigmoid(beta (u / len+ - v / len-))`` (Lambert et al., Tulu 3, arXiv
    2411.15124)."""

    @property
    def length_normalised(self) -> bool:
        return True

    def of_margin(self, margin: Tensor) -> Tensor:
        return sigmoid_loss(self.beta * margin)


@dataclass(frozen=True)
class SmoothedLoss(MarginLoss):
    """Base: a label is taken to be flipped with probability ``label_smoothing``."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "label_smoothing", 0.0, 0.5)


@register("conservative")
@dataclass(frozen=True)
class Conservative(SmoothedLoss):
    """Conservative DPO: ``-(1 - q) log sigmoid(beta h) - q log sigmoid(-beta h)`` (Mitchell, "A note on DPO with noisy
    preferences", 2023).

    Args:
        label_smoothing: q in [0, 0.5], 0.1.
    """

    label_smoothing: float = 0.1

    def of_margin(self, margin: Tensor) -> Tensor:
        return sigmoid_loss(self.beta * margin, self.label_smoothing)


@register("robust")
@dataclass(frozen=True)
class Robust(SmoothedLoss):
    """Robust DPO, unbiased under flipped labels: ``[-(1 - q) log sigmoid(beta h) + q log sigmoid(-beta h)] / (1 - 2
    q)`` (Chowdhury et al., arXiv 2403.00409).

    Args:
        label_smoothing: q in [0, 0.5), 0.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "label_smoothing", 0.0, 0.5, open_high=True)

    def of_margin(self, margin: Tensor) -> Tensor:
        q, logits = self.label_smoothing, self.beta * margin
        return ((1.0 - q) * sigmoid_loss(logits) - q * sigmoid_loss(-logits)) / (1.0 - 2.0 * q)


@register("hinge")
@dataclass(frozen=True)
class Hinge(MarginLoss):
    """SLiC on the log-ratio margin: ``max(0, 1 - beta h)`` (Zhao et al., arXiv 2305.10425; Liu et al., arXiv
    2309.06657).

    Args:
        beta: 0.1, the reciprocal of the margin.
    """

    def of_margin(self, margin: Tensor) -> Tensor:
        return F.relu(1.0 - self.beta * margin)


@register("ipo")
@dataclass(frozen=True)
class Ipo(MarginLoss):
    """IPO, length-normalised as in TRL: ``(u / len+ - v / len- - 1 / (2 beta))^2`` (Azar et al., arXiv 2310.12036, eq.
    17).

    Args:
        beta: 0.1, > 0; the target margin is 1 / (2 beta).
    """

    @property
    def length_normalised(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "beta", 0.0, math.inf, open_low=True)

    def of_margin(self, margin: Tensor) -> Tensor:
        return (margin - 1.0 / (2.0 * self.beta)).square()


@register("exo_pair")
@dataclass(frozen=True)
class ExoPair(SmoothedLoss):
    """EXO on pairs, the reverse KL of two-way choices: ``sigmoid(z) (log sigmoid(z) - log(1 - q)) + sigmoid(-z) (log
    sigmoid(-z) - log q), z = beta h`` (Ji et al., arXiv 2402.00856, eq. 16).

    Args:
        label_smoothing: q in (0, 0.5], 1e-3 (TRL has no usable default: its 0 is refused).
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "label_smoothing", 0.0, 0.5, open_low=True)

    def of_margin(self, margin: Tensor) -> Tensor:
        logits = self.beta * margin
        wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-self.label_smoothing))
        return wins + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(self.label_smoothing))


@register("discopop")
@dataclass(frozen=True)
class DiscoPOP(MarginLoss):
    """DiscoPOP: ``-(1 - m) log sigmoid(z) + m e^-z, m = sigmoid(z / tau), z = beta h`` (Lu et al., arXiv 2406.08414,
    eq. 5).

    The second term is taken as one exponential, so that it does not overflow at margins where m is 0 (TRL: NaN); with
    ``discopop_tau`` > 1 it is constant above the largest float32.

    Args:
        discopop_tau: tau > 0, 0.05.
    """

    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "discopop_tau", 0.0, math.inf, open_low=True)

    def of_margin(self, margin: Tensor) -> Tensor:
        logits = self.beta * margin
        scaled = logits / self.discopop_tau
        return torch.sigmoid(-scaled) * sigmoid_loss(logits) + bounded_exp(F.logsigmoid(scaled) - logits)
