"""What TRL's trainers log, from the statistics of a call: its names, its values."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.stats import Stats

__all__ = [
    "clip_metrics",
    "entropy_metric",
    "logit_metrics",
    "pair_metrics",
    "pair_token_metrics",
    "sequence_means",
    "token_mean",
]


PAIR_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)


def token_mean(values: Tensor, batch: Batch, members: Tensor | None = None) -> Tensor:
    """Mean over the call's loss tokens, or those of them that are members; 0 over none: (N,) -> ()."""
    if members is None:
        return batch.sum_tokens(values) / batch.own_tokens
    counted = members if batch.mask is None else members & batch.mask
    return torch.where(counted, values.double(), 0.0).sum() / counted.sum().clamp_min(1)


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
    # of a raw logit that is infinite a difference would be NaN
    return {
        "logits/chosen": token_mean(stats.mean_logit, batch, chosen),
        "logits/rejected": token_mean(stats.mean_logit, batch, ~chosen),
    }


def pair_token_metrics(stats: Stats, batch: Batch) -> dict[str, Tensor]:
    """``entropy``, ``logits/...`` of both sides and ``mean_token_accuracy`` of the chosen one, of pairs: means over
    loss tokens, 0 over none.
    """
    assert stats.mean_logit is not None and stats.is_top1 is not None
    sums = batch.sum_per_sequence(torch.stack([stats.mean_logit, stats.is_top1], 1))  # (B, 2)
    counts = batch.lengths.unflatten(0, (2, -1)).sum(1).clamp_min(1)  # (2,)
    means = sums.unflatten(0, (2, -1)).sum(1) / counts.unsqueeze(1)  # (2, 2), chosen and rejected
    sides = {"logits/chosen": means[0, 0], "logits/rejected": means[1, 0], "mean_token_accuracy": means[0, 1]}
    return entropy_metric(stats, batch) | sides


def pair_metrics(rewards: Tensor, logps: Tensor, batch: Batch) -> dict[str, Tensor]:
    """``rewards/...`` and ``logps/...`` of pairs: (B,), (B,) -> scalars."""
    chosen, rejected = batch.halves(rewards)
    logp_chosen, logp_rejected = batch.halves(logps)
    columns = torch.stack(
        [chosen, rejected, (chosen > rejected).double(), chosen - rejected, logp_chosen, logp_rejected]
    )
    return dict(zip(PAIR_METRICS, columns.mean(1).unbind(), strict=True))


def clip_metrics(below: Tensor, above: Tensor, batch: Batch, *, per_sequence: bool) -> dict[str, Tensor]:
    """``clip_ratio/...``: how much of the call lies outside the clip range.

    Args:
        below, above: (N,) bool.
        per_sequence: the ratio is one per sequence, so sequences are counted and not tokens.
    """
    members = torch.stack([below, above, below | above], 1)  # (N, 3)
    counts = batch.sum_per_sequence(members)  # (B, 3)
    shares = counts / batch.lengths.unsqueeze(1)  # (B, 3), NaN for an empty sequence
    means = shares.nanmean(0) if per_sequence else counts.sum(0) / batch.own_tokens
    low, high, region = means.unbind()
    least, most = _extremes(shares[:, 0], shares[:, 1], batch.some_empty)
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/low_min": least,
        "clip_ratio/high_mean": high,
        "clip_ratio/high_max": most,
        "clip_ratio/region_mean": region,
    }


def _extremes(low: Tensor, high: Tensor, some_nan: bool) -> tuple[Tensor, Tensor]:
    """The least of the one and the largest of the other, NaN left out; NaN over none: (B,), (B,) -> (), ()."""
    if not low.numel():
        return _nan(low), _nan(low)
    if not some_nan:
        return low.amin(), high.amax()
    # the largest is minus the least of the negatives
    least = torch.stack([low, -high]).nan_to_num(nan=torch.inf).amin(1)  # (2,)
    # infinity times 0 is NaN
    least = least + 0.0 * least
    return least[0], -least[1]


def _nan(like: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=torch.float64, device=like.device)
