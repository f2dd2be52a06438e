"""Pairwise losses that need no reference model: CPO and its relatives, ORPO.

a and d are the summed log-probs of chosen and rejected, len+ and len- their lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.metrics import pair_metrics
from fused_po.losses.pairwise import PairLoss
from fused_po.losses.registry import register
from fused_po.losses.terms import (
    HUGE,
    bounded,
    bounded_expm1,
    choose,
    chosen_nll,
    policy_logp,
    require_choice,
    require_range,
    sigmoid_loss,
)
from fused_po.stats import Stats

__all__ = ["AlphaPO", "Cpo", "Orpo", "SimPO"]

# log(1 - e^x) and its slope are finite below
LARGEST_LOGP = -1e-37


@register("cpo")
@dataclass(frozen=True)
class Cpo(PairLoss):
    """CPO: ``-log sigmoid(beta (a - d)) + cpo_alpha NLL(chosen)`` (Xu et al., arXiv 2401.08417), with the variants of
    TRL's ``CPOTrainer``.

    Args:
        beta: 0.1.
        loss_type: ``sigmoid``, ``hinge`` max(0, 1 - beta m), ``ipo`` (m - 1 / (2 beta))^2 and ``simpo`` -log
            sigmoid(beta m - simpo_gamma); m = a - d, for ipo and simpo of the mean log-probs.
        label_smoothing: q in [0, 0.5] of sigmoid and simpo, 0.
        cpo_alpha: 1.0, weight of the mean NLL of the chosen answers' tokens.
        simpo_gamma: 0.5, target margin of simpo, in units of the logit.
        alpha: 0.0; not 0: a log-prob x becomes (1 - e^{-alpha x}) / alpha (AlphaPO), constant where e^{-alpha x} would
            pass the largest float32.
    """

    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0

    loss_types: ClassVar[tuple[str, ...]] = ("sigmoid", "hinge", "ipo", "simpo")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "loss_type", self.loss_types)
        require_range(self, "label_smoothing", 0.0, 0.5)
        require_range(self, "cpo_alpha", 0.0, math.inf)
        require_range(self, "alpha", -math.inf, math.inf, open_low=True, open_high=True)
        require_range(self, "simpo_gamma", -math.inf, math.inf, open_low=True, open_high=True)
        if self.loss_type == "ipo":
            require_range(self, "beta", 0.0, math.inf, open_low=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp"})

    @property
    def length_normalised(self) -> bool:
        return self.loss_type in ("ipo", "simpo")

    @property
    def has_unsided_terms(self) -> bool:
        return self.cpo_alpha != 0.0

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        terms = super().__call__(stats, batch)
        if self.cpo_alpha != 0.0:
            terms["nll"] = self.cpo_alpha * chosen_nll(stats, batch)
        return terms

    def logps(self, stats: Stats, batch: Batch) -> Tensor:
        """Summed or mean log-probs, (B,)."""
        logp = policy_logp(stats)
        return batch.mean_per_sequence(logp) if self.length_normalised else batch.sum_per_sequence(logp)

    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        logps = bounded(self.logps(stats, batch), HUGE)
        return logps if self.alpha == 0.0 else -bounded_expm1(-self.alpha * logps) / self.alpha

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        margin = chosen - rejected
        if self.loss_type == "hinge":
            return F.relu(1.0 - self.beta * margin)
        if self.loss_type == "ipo":
            return (margin - 1.0 / (2.0 * self.beta)).square()
        gamma = self.simpo_gamma if self.loss_type == "simpo" else 0.0
        return sigmoid_loss(self.beta * margin - gamma, self.label_smoothing)

    def pattern(self, batch: Batch) -> Tensor | None:
        if self.alpha != 0.0 or self.cpo_alpha != 0.0:
            return None
        signs = choose(batch.chosen, 1.0, -1.0)
        return signs / batch.token_lengths.clamp_min(1) if self.length_normalised else signs

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        found = pair_metrics(self.beta * self.scores(stats, batch), self.logps(stats, batch), batch)
        nll = chosen_nll(stats, batch) if self.cpo_alpha != 0.0 else torch.zeros_like(found["rewards/margins"])
        return found | {"nll_loss": nll}


@register("simpo")
@dataclass(frozen=True)
class SimPO(Cpo):
    """SimPO: ``-log sigmoid(beta (a / len+ - d / len-) - gamma)`` (Meng et al., arXiv 2405.14734, eq. 6).

    No NLL term unless asked for; TRL's CPO trainer adds one unless its ``cpo_alpha`` is 0.

    Args:
        beta: 0.1 as in TRL; the paper uses 2.0 to 2.5.
        simpo_gamma: gamma, 0.5, in units of the logit, as TRL's; so gamma / beta on mean log-probs.
        label_smoothing: 0.0.
        cpo_alpha: 0.0, weight of the NLL.
        alpha: 0.0, see ``alphapo``.
    """

    loss_type: str = field(default="simpo", init=False)
    cpo_alpha: float = 0.0


@register("alphapo")
@dataclass(frozen=True)
class AlphaPO(SimPO):
    """AlphaPO, SimPO on rewards of another shape: ``-log sigmoid(beta (r+ - r-) - gamma), r = (1 - e^{-alpha x}) /
    alpha`` of the mean log-prob x (Gupta et al., arXiv 2501.03884).

    Exponentials are constant above the largest float32.

    Args:
        alpha: 0.1 (TRL's default 0 is SimPO).
    """

    alpha: float = 0.1


@register("orpo")
@dataclass(frozen=True)
class Orpo(PairLoss):
    """ORPO: ``NLL(chosen) - beta log sigmoid(o), o = logit(P+) - logit(P-)`` with P = e^{mean log-prob} (Hong et al.,
    arXiv 2403.07691, eq. 6 and 7).

    Mean log-probs are taken at -1e-37 at most, where log(1 - P) is still finite (TRL: NaN at a log-prob of 0).

    TRL takes the NLL over prompt and answer: give labels to the prompts of the chosen answers too, and mark these
    tokens by ``nll_mask``. Without it the NLL is that of the chosen answers.

    Side inputs: ``nll_mask``, bool in the shape of labels, True for tokens that count in the NLL only; optional.

    Args:
        beta: 0.1, weight of the odds-ratio term (lambda in the paper).
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "nll_mask"})

    @property
    def length_normalised(self) -> bool:
        return True

    @property
    def has_unsided_terms(self) -> bool:
        return True

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        return {"nll": chosen_nll(stats, batch)} | super().__call__(stats, batch)

    def logps(self, stats: Stats, batch: Batch) -> Tensor:
        """Mean log-prob of each answer, (B,)."""
        logp, prompt = policy_logp(stats), batch.token("nll_mask")
        if prompt is None:
            return batch.mean_per_sequence(logp)
        answer = ~prompt
        return batch.sum_per_sequence(torch.where(answer, logp, 0.0)) / batch.sum_per_sequence(answer).clamp_min(1)

    def scores(self, stats: Stats, batch: Batch) -> Tensor:
        logps = bounded(self.logps(stats, batch), HUGE).clamp(max=LARGEST_LOGP)
        return logps - torch.log(-torch.expm1(logps))

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.beta * sigmoid_loss(chosen - rejected)

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        logps = self.logps(stats, batch)
        chosen, rejected = batch.halves(self.scores(stats, batch))
        return pair_metrics(self.beta * logps, logps, batch) | {
            "nll_loss": chosen_nll(stats, batch),
            "log_odds_ratio": F.logsigmoid(chosen - rejected).mean(),
            "log_odds_chosen": (chosen - rejected).mean(),
        }
