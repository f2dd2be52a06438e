"""Losses on single answers that are desirable or not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import Loss, register
from fused_po.losses.terms import policy_logp, require_range, sequence_log_ratio
from fused_po.stats import Stats

__all__ = ["Kto"]


@register("kto")
@dataclass(frozen=True)
class Kto(Loss):
    """KTO: ``w_D (1 - sigmoid(beta (u - z0)))`` on desirable answers, ``w_U (1 - sigmoid(beta (z0 - u)))`` on the
    others.

    Ethayarajh et al., arXiv 2402.01306, eq. 8, as TRL's ``KTOTrainer`` computes it; the mean is over all answers. u
    is the answer's log-ratio to the reference.

    Side inputs: ``ref_logp``; ``desirable`` (B,) bool; ``kl``, the scalar z0 >= 0, detached (TRL: the mean over ranks
    and batch of mismatched prompt and completion log-ratios, clamped at 0).

    Args:
        beta: 0.1.
        desirable_weight: 1.0.
        undesirable_weight: 1.0.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def horizon(self) -> str:
        return "sequence"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "ref_logp", "desirable", "kl"})

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            require_range(self, name, 0.0, math.inf)

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        desirable, kl = batch.sequence("desirable"), batch.scalar("kl")
        assert desirable is not None and kl is not None
        margin = self.beta * (sequence_log_ratio(stats, batch) - kl)
        # 1 - sigmoid(x) = sigmoid(-x)
        value = torch.where(
            desirable, self.desirable_weight * torch.sigmoid(-margin), self.undesirable_weight * torch.sigmoid(margin)
        )
        return {"preference": batch.mean_sequences(value)}

    def pattern(self, batch: Batch) -> Tensor | None:
        return torch.ones_like(batch.chosen, dtype=torch.float32)

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        desirable, kl = batch.sequence("desirable"), batch.scalar("kl")
        assert desirable is not None and kl is not None
        rewards = self.beta * sequence_log_ratio(stats, batch)
        logps = batch.sum_per_sequence(policy_logp(stats))
        found = {"kl": kl}
        for side, members in (("chosen", desirable), ("rejected", ~desirable)):
            # NaN without a member, as a mean over nothing
            count = members.sum()
            found[f"rewards/{side}"] = torch.where(members, rewards, 0.0).sum() / count
            found[f"logps/{side}"] = torch.where(members, logps, 0.0).sum() / count
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found
