"""Metrics of a training run: weighed, and averaged over steps and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_po.ops import LossOutput
from fused_po.ops.checks import IGNORE

__all__ = ["Averages", "weighed_metrics"]

# means over tokens; all others are over answers
_PER_TOKEN = ("logits/", "clip_ratio/", "cispo_clip_ratio", "entropy", "kl", "mean_token_accuracy")
# normalised by all of a step, so that micro-batches report shares
_SHARES = ("loss", "nll_loss", "policy_loss")


def weighed_metrics(batch: Mapping[str, Tensor], out: LossOutput, paired: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """The loss and what it reports, each with the number of tokens or answers that it is a mean of.

    Of pairs whose loss logs no rewards of its own, ``rewards/accuracies`` and ``rewards/margins`` are those of the
    log-ratios to the reference.
    """
    found = {"loss": out.loss, **out.metrics}
    if paired and "ref_logp" in batch and "rewards/margins" not in found and out.stats.logp is not None:
        chosen, rejected = (out.stats.logp.double() - batch["ref_logp"]).sum(1).chunk(2)
        found["rewards/accuracies"] = (chosen > rejected).double().mean()
        found["rewards/margins"] = (chosen - rejected).mean()
    tokens = (batch["labels"] != IGNORE).sum(1).double()  # (B,)
    answers, chosen_ones = torch.ones_like(tokens), batch["signs"] > 0
    sides = {"chosen": chosen_ones, "rejected": ~chosen_ones, "accuracy": chosen_ones}

    def weight(name: str) -> Tensor:
        if name in _SHARES:
            return answers.new_ones(())
        # KTO's is one number for the mismatched answers of a batch
        per_token = name.startswith(_PER_TOKEN) and not (name == "kl" and "other_labels" in batch)
        members = sides.get(name.replace("_", "/").split("/")[-1], slice(None))
        return (tokens if per_token else answers)[members].sum()

    return {name: (value, weight(name)) for name, value in found.items()}


class Averages:
    """Weighted means over steps and ranks, without a wait for the device until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, tuple[Tensor, Tensor]], counts: bool = True) -> None:
        """Take values in; those that do not count are named alone, for all ranks must name the same."""
        for name, (value, weight) in values.items():
            weight = weight.to(value.device, torch.float64) * counts
            # a mean over nothing may be NaN
            pair = torch.stack([torch.where(weight > 0, value.detach().double() * weight, 0.0), weight])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self, accelerator: Any, steps: int = 1) -> dict[str, float]:
        """The means over the last ``steps``, those over nothing left out."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums, weights = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").T.tolist()
        self._sums = {}
        per_step = [steps if name in _SHARES else weight for name, weight in zip(names, weights, strict=True)]
        found = {name: total / size for name, total, size in zip(names, sums, per_step, strict=True) if size}
        if {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= set(found):
            # of single answers the sides need not be as many
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        elif {"rewards/chosen", "rewards/rejected"} & set(found):
            # answers of one side have no margin
            found.pop("rewards/margins", None)
        return found
