"""What TRL's trainers log, from the statistics of a call: its names, its values."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.stats import Stats

__all__ = ["clip_metrics", "entropy_metric", "logit_metrics", "pair_metrics", "sequence_means", "token_mean"]


def token_mean(values: Tensor, batch: Batch, members: Tensor | None = None) -> Tensor:
    """Mean over the call's loss tokens, or those of them that are members; 0 over none: (N,) -> ()."""
    counted = batch.loss_tokens() if members is None else batch.loss_tokens() & members
    total = torch.where(counted, values.double(), 0.0).sum()
    return total / counted.sum().clamp_min(1)


def sequence_means(values: Tensor, batch: Batch) -> Tensor:
    """Mean over the loss tokens of each sequence, NaN for an empty one: (N,) -> (B,)."""
    return batch.sum_per_sequence(values) / batch.lengths


def entropy_metric(stats: Stats, batch: Batch) -> dict[str, Tensor]:
    """``entropy``: its mean over all loss tokens."""
    assert stats.entropy is not None
    return {"entropy": token_mean(stats.entropy, batch)}


def logit_metrics(stats: Stats, batch: Batch, chosen: Tensor) -> dict[str, Tensor]:
    """``logits/chosen`` and ``logits/rejected``: the mean raw logit over the loss tokens of each side.

    Args:
        chosen: (N,) bool, tokens of chosen (desirable) answers.
    """
    assert stats.mean_logit is not None
    return {
        "logits/chosen": token_mean(stats.mean_logit, batch, chosen),
        "logits/rejected": token_mean(stats.mean_logit, batch, ~chosen),
    }


def pair_metrics(rewards: Tensor, logps: Tensor, batch: Batch) -> dict[str, Tensor]:
    """``rewards/...`` and ``logps/...`` of pairs: (B,), (B,) -> scalars."""
    chosen, rejected = batch.halves(rewards)
    logp_chosen, logp_rejected = batch.halves(logps)
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": logp_chosen.mean(),
        "logps/rejected": logp_rejected.mean(),
    }


def clip_metrics(below: Tensor, above: Tensor, batch: Batch, *, per_sequence: bool) -> dict[str, Tensor]:
    """``clip_ratio/...``: how much of the call lies outside the clip range.

    Args:
        below, above: (N,) bool.
        per_sequence: the ratio is one per sequence, so sequences are counted and not tokens.
    """
    found = {}
    for name, members in (("low", below), ("high", above), ("region", below | above)):
        by_sequence = sequence_means(members.double(), batch)  # (B,)
        found[f"clip_ratio/{name}_mean"] = (
            by_sequence.nanmean() if per_sequence else token_mean(members.double(), batch)
        )
        # the extremes over sequences, NaN over none
        if name == "low":
            found["clip_ratio/low_min"] = (
                _extreme(by_sequence, torch.inf).amin() if by_sequence.numel() else _nan(below)
            )
        if name == "high":
            found["clip_ratio/high_max"] = (
                _extreme(by_sequence, -torch.inf).amax() if by_sequence.numel() else _nan(below)
            )
    return found


def _extreme(values: Tensor, ignored: float) -> Tensor:
    """Values with NaN out of the way of an extreme, unless there is nothing else."""
    return torch.where(values.isnan() & ~values.isnan().all(), ignored, values)


def _nan(like: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=torch.float64, device=like.device)
