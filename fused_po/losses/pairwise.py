"""Losses on pairs of a chosen and a rejected answer; first half of the sequences chosen, second half rejected.

Throughout: a and d are the summed log-probs of chosen and rejected, u and v their log-ratios to the reference, h = u
- v.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import Loss, register
from fused_po.losses.terms import difference, policy_logp, require_range, sequence_log_ratio, sigmoid_loss
from fused_po.stats import Stats

__all__ = ["Conservative", "Hinge", "Ipo", "Sigmoid", "SimPO"]


@dataclass(frozen=True)
class PairwiseLoss(Loss):
    """Base: one value per pair, and the implicit rewards that TRL logs."""

    beta: float = 0.1

    @property
    def horizon(self) -> str:
        return "pair"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "ref_logp"})

    def __post_init__(self) -> None:
        require_range(self, "beta", 0.0, math.inf)

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        margin = difference(*batch.halves(self.scores(stats, batch)))
        return {"preference": batch.mean_pairs(self.per_pair(margin))}

    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        """What is compared between the sides, (B,): the log-ratio to the reference."""
        return sequence_log_ratio(stats, batch)

    @abstractmethod
    def per_pair(self, margin: Tensor) -> Tensor:
        """The loss of each pair from how far the chosen score lies above the rejected: (B/2,) -> (B/2,)."""

    def rewards(self, stats: Stats, batch: Batch) -> Tensor:
        """The implicit reward of each sequence, (B,): beta times its log-ratio to the reference."""
        return self.beta * sequence_log_ratio(stats, batch)

    def pattern(self, batch: Batch) -> Tensor | None:
        return torch.where(batch.chosen, 1.0, -1.0)

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        chosen, rejected = batch.halves(self.rewards(stats, batch))
        logp_chosen, logp_rejected = batch.halves(batch.sum_per_sequence(policy_logp(stats)))
        return {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": logp_chosen.mean(),
            "logps/rejected": logp_rejected.mean(),
        }


@register("sigmoid")
@dataclass(frozen=True)
class Sigmoid(PairwiseLoss):
    """DPO: ``-log sigmoid(beta h)`` (Rafailov et al., arXiv 2305.18290, eq. 7). TRL's ``loss_type="sigmoid"``.

    Args:
        beta: 0.1, strength of the reference.
    """

    def per_pair(self, margin: Tensor) -> Tensor:
        return sigmoid_loss(self.beta * margin, 0.0)


@register("conservative")
@dataclass(frozen=True)
class Conservative(PairwiseLoss):
    """Conservative DPO: ``-(1 - q) log sigmoid(beta h) - q log sigmoid(-beta h)`` (Mitchell, "A note on DPO with
    noisy preferences", 2023).

    TRL's ``sigmoid`` ignores ``label_smoothing``; this one does not.

    Args:
        beta: 0.1.
        label_smoothing: q in [0, 0.5], the probability that a label is flipped; 0.1.
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "label_smoothing", 0.0, 0.5)

    def per_pair(self, margin: Tensor) -> Tensor:
        return sigmoid_loss(self.beta * margin, self.label_smoothing)


@register("hinge")
@dataclass(frozen=True)
class Hinge(PairwiseLoss):
    """``max(0, 1 - beta h)`` (SLiC with the log-ratio margin: Zhao et al., arXiv 2305.10425; Liu et al., arXiv
    2309.06657). TRL's ``hinge``.

    Args:
        beta: 0.1, the reciprocal of the margin.
    """

    def per_pair(self, margin: Tensor) -> Tensor:
        return F.relu(1.0 - self.beta * margin)


@register("ipo")
@dataclass(frozen=True)
class Ipo(PairwiseLoss):
    """IPO, length-normalised as in TRL: ``(u / len+ - v / len- - 1 / (2 beta))^2`` (Azar et al., arXiv 2310.12036,
    eq. 17).

    Args:
        beta: 0.1, > 0; the target margin is 1 / (2 beta).
    """

    def __post_init__(self) -> None:
        require_range(self, "beta", 0.0, math.inf, open_low=True)

    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        return super().scores(stats, batch) / batch.lengths.clamp_min(1)

    def per_pair(self, margin: Tensor) -> Tensor:
        return (margin - 1.0 / (2.0 * self.beta)).square()

    def pattern(self, batch: Batch) -> Tensor | None:
        return _length_normalised_sides(batch)


@register("simpo")
@dataclass(frozen=True)
class SimPO(PairwiseLoss):
    """SimPO: ``-log sigmoid(beta (a / len+ - d / len-) - gamma)``, gamma = ``simpo_gamma`` (Meng et al., arXiv
    2405.14734, eq. 6).

    No reference and no NLL term (TRL's CPO trainer adds one unless its ``cpo_alpha`` is 0).

    Args:
        beta: 0.1 as in TRL; the paper uses 2.0 to 2.5.
        simpo_gamma: 0.5, the target margin of the rewards; in units of the logit, as TRL's, so gamma / beta on mean
            log-probs.
        label_smoothing: 0.0, as in TRL.
    """

    simpo_gamma: float = 0.5
    label_smoothing: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "label_smoothing", 0.0, 0.5)

    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        return batch.mean_per_sequence(policy_logp(stats))

    def rewards(self, stats: Stats, batch: Batch) -> Tensor:
        return self.beta * self.scores(stats, batch)

    def per_pair(self, margin: Tensor) -> Tensor:
        return sigmoid_loss(self.beta * margin - self.simpo_gamma, self.label_smoothing)

    def pattern(self, batch: Batch) -> Tensor | None:
        return _length_normalised_sides(batch)


def _length_normalised_sides(batch: Batch) -> Tensor:
    return torch.where(batch.chosen, 1.0, -1.0) / batch.token_lengths.clamp_min(1)
