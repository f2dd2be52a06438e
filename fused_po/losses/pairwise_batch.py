"""Pairwise losses that compare a pair with the rest of its batch, so that the batch is their horizon."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.pairwise import ReferenceLoss
from fused_po.losses.registry import register
from fused_po.losses.terms import difference, require_range, sigmoid_loss
from fused_po.stats import Stats

__all__ = ["Aot", "AotUnpaired", "BetaDPO"]


@dataclass(frozen=True)
class BatchPairLoss(ReferenceLoss):
    """Base: pairs that hold a loss token, taken together."""

    @property
    def horizon(self) -> str:
        return "batch"

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        chosen, rejected = batch.halves(batch.lengths)
        value = self.of_batch(stats, batch, chosen + rejected > 0)
        return {"preference": value.sum() / batch.num_pairs}

    @abstractmethod
    def of_batch(self, stats: Stats, batch: Batch, members: Tensor) -> Tensor:
        """The loss of each pair, 0 for pairs that are no members: (P,)."""

    def value(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        raise AssertionError("a pair has no loss without its batch")


@dataclass(frozen=True)
class SortedLoss(BatchPairLoss):
    """Base: optimal transport in one dimension, the k-th smallest of one side against the k-th smallest of the other.

    Args:
        label_smoothing: q in [0, 0.5], 0.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "label_smoothing", 0.0, 0.5)
        if self.use_weighting:
            raise ValueError(f"use_weighting weights pairs, and {self.name!r} takes them apart")

    def sorted_loss(self, upper: Tensor, lower: Tensor, members: Tensor) -> Tensor:
        """``sigmoid_loss(beta (upper - lower))`` of the sorted members: (P,), (P,), (P,) bool -> (P,)."""
        first, second = (torch.where(members, side, torch.inf).sort().values for side in (upper, lower))
        loss = sigmoid_loss(self.beta * difference(first, second), self.label_smoothing)
        return torch.where(torch.arange(loss.shape[0], device=loss.device) < members.sum(), loss, 0.0)


@register("aot")
@dataclass(frozen=True)
class Aot(SortedLoss):
    """AOT on pairs: ``-log sigmoid(beta (sort(a - d) - sort(a_ref - d_ref)))``, sorted across the batch (Melnyk et al.,
    arXiv 2406.05882).

    Micro-batches, each sorted for itself, do not add up to the full batch.
    """

    def of_batch(self, stats: Stats, batch: Batch, members: Tensor) -> Tensor:
        logps = self.logps(stats, batch)
        policy = difference(*batch.halves(logps))
        # log-ratio = log-prob - reference
        reference = difference(*batch.halves(difference(logps.detach(), self.log_ratios(stats, batch).detach())))
        return self.sorted_loss(policy, reference, members)


@register("aot_unpaired")
@dataclass(frozen=True)
class AotUnpaired(SortedLoss):
    """AOT on unpaired answers: ``-log sigmoid(beta (sort(u) - sort(v)))``, sorted across the batch (Melnyk et al.,
    arXiv 2406.05882). ``aot_pair`` in TRL 0.24 to 0.26.

    Micro-batches, each sorted for itself, do not add up to the full batch.
    """

    def of_batch(self, stats: Stats, batch: Batch, members: Tensor) -> Tensor:
        return self.sorted_loss(*batch.halves(self.scores(stats, batch)), members)


@register("beta_dpo")
@dataclass(frozen=True)
class BetaDPO(BatchPairLoss):
    """beta-DPO, beta follows the batch: ``-log sigmoid(beta' h), beta' = beta (1 + alpha (mean(beta h) - shift))``
    over the pairs nearest to the usual margin (Wu et al., arXiv 2407.08639).

    A share ``kept`` of the pairs counts, those whose margin beta h lies nearest to the running mean; the paper draws
    them at random with Gaussian weights, here the likeliest are taken, so that a step can be repeated. Micro-batches,
    each with a beta and a choice of its own, do not add up to the full batch.

    Side inputs: ``shift``, the running mean of the margins beta h before this batch (the paper: momentum 0.9),
    optional: 0. The metric ``rewards/margins`` is what to update it with.

    Args:
        beta: 0.1.
        beta_alpha: alpha, 0.6.
        kept: share of the pairs in (0, 1], 0.8.
        beta_min: 1e-3, least beta'.
    """

    beta_alpha: float = 0.6
    kept: float = 0.8
    beta_min: float = 1e-3

    also_needs: ClassVar[frozenset[str]] = frozenset({"shift"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "beta_alpha", 0.0, math.inf)
        require_range(self, "kept", 0.0, 1.0, open_low=True)
        require_range(self, "beta_min", 0.0, math.inf)

    def of_batch(self, stats: Stats, batch: Batch, members: Tensor) -> Tensor:
        margin = difference(*batch.halves(self.scores(stats, batch)))  # (P,)
        reward, shift = self.beta * margin.detach(), batch.scalar("shift")
        distance = (reward if shift is None else reward - shift).abs()
        place = torch.where(members, distance, torch.inf).argsort(stable=True).argsort()  # (P,)
        # 0.55 times 20 is 11, to rounding
        kept = members & (place < (members.sum().double() * self.kept - 1e-9).ceil())
        usual = torch.where(kept, reward, 0.0).sum() / kept.sum().clamp_min(1)
        usual = usual if shift is None else usual - shift
        beta = (self.beta * (1.0 + self.beta_alpha * usual)).clamp_min(self.beta_min)
        loss = sigmoid_loss(beta * margin)
        weight = self.pair_weight(stats, batch)
        loss = loss if weight is None else loss * weight
        # the mean over the pairs that are kept, as a share of all
        share = members.sum().double() / kept.sum().clamp_min(1)
        return torch.where(kept, loss * share, 0.0)
