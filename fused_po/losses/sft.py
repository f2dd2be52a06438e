"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import Loss
from fused_po.losses.metrics import entropy_metric, token_mean
from fused_po.losses.registry import register
from fused_po.losses.terms import chosen_nll, policy_logp, weighted
from fused_po.stats import Stats

__all__ = ["Sft"]


@register("sft")
@dataclass(frozen=True)
class Sft(Loss):
    """Supervised fine-tuning: ``-mean_t log p_t`` over the call's loss tokens (TRL's ``SFTTrainer``; ``paired``: TRL's
    DPO ``loss_type="sft"``).

    Side inputs: ``row_weight``, optional, multiplies a token's loss (unpaired).

    Args:
        paired: False. True: the batch holds pairs and only the chosen half is learned.
    """

    paired: bool = False

    weighs_sequences: ClassVar[bool] = False

    @property
    def horizon(self) -> str:
        return "token"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp"} if self.paired else {"logp", "row_weight"})

    @property
    def reports(self) -> tuple[str, ...]:
        return ("entropy", "is_top1")

    @property
    def has_unsided_terms(self) -> bool:
        return True

    def silent(self, batch: Batch) -> Tensor | None:
        """The rejected half, or rows that weigh nothing."""
        if self.paired:
            return ~batch.chosen
        row_weight = batch.token("row_weight")
        return None if row_weight is None else row_weight == 0

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        if self.paired:
            return {"nll": chosen_nll(stats, batch)}
        loss = -policy_logp(stats)
        row_weight = batch.token("row_weight")
        return {"nll": batch.mean_tokens(loss if row_weight is None else weighted(loss, row_weight))}

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        assert stats.is_top1 is not None
        learned = batch.chosen if self.paired else torch.ones_like(batch.chosen)
        accuracy = token_mean(stats.is_top1.double(), batch, learned)
        return entropy_metric(stats, batch) | {"mean_token_accuracy": accuracy}
