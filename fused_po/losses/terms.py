"""Terms that several losses share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.stats import Stats

__all__ = [
    "difference",
    "entropy_bonus",
    "importance_ratio",
    "k3",
    "log_ratio",
    "policy_logp",
    "require_range",
    "sequence_log_ratio",
    "sigmoid_loss",
]

# exp of it is finite in float32 with room for a product
MAX_LOG_RATIO = 80.0
# stands for infinity, so that a product with 0 is 0
HUGE = 1e30


def policy_logp(stats: Stats) -> Tensor:
    """The policy's log-probs (N,); every loss asks the kernels for them."""
    assert stats.logp is not None
    return stats.logp


def sequence_log_ratio(stats: Stats, batch: Batch) -> Tensor:
    """Log-ratio of each sequence to the reference, (B,) float64."""
    reference = batch.sequence("ref_logp")
    assert reference is not None
    return difference(batch.sum_per_sequence(policy_logp(stats)), reference)


def difference(left: Tensor, right: Tensor) -> Tensor:
    """``left - right`` of log-probs, clamped to +-1e30; 0 where both are the same infinity."""
    same = (left == right) & left.isinf()
    return _bounded(torch.where(same, 0.0, left - right), HUGE)


def log_ratio(logp: Tensor, other: Tensor) -> Tensor:
    """``logp - other`` per token, clamped to +-80 so that its exponential stays finite."""
    return _bounded(difference(logp, other), MAX_LOG_RATIO)


def importance_ratio(logp: Tensor, old: Tensor | None) -> Tensor:
    """``pi / pi_old`` per token; without old log-probs the current ones, detached (value 1, gradient that of logp)."""
    return log_ratio(logp, logp.detach() if old is None else old).exp()


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """The KL estimator ``e^{ref - logp} - (ref - logp) - 1`` per token (k3 of Schulman, "Approximating KL
    Divergence", 2020).
    """
    difference = -log_ratio(logp, ref)
    return torch.expm1(difference) - difference


def entropy_bonus(stats: Stats, batch: Batch, coefficient: float) -> Tensor:
    """``-coefficient`` times the mean entropy over the call's loss tokens."""
    assert stats.entropy is not None
    return -coefficient * batch.mean_tokens(stats.entropy)


def sigmoid_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """``-(1 - q) log sigmoid(x) - q log sigmoid(-x)``."""
    loss = -F.logsigmoid(logits)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


def require_range(loss: object, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Check a hyper-parameter of a loss.

    Raises:
        ValueError: it is NaN or lies outside [low, high], or on an excluded lower end.
    """
    value = getattr(loss, name)
    inside = low < value <= high if open_low else low <= value <= high
    if not inside:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must lie in {bracket}{low}, {high}], got {value}")


def _bounded(values: Tensor, limit: float) -> Tensor:
    """Clamp to +-limit; unlike ``clamp``, whose gradient hides a NaN, this keeps it."""
    return torch.where(values.abs() > limit, values.sign() * limit, values)
