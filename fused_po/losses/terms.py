"""Terms that several losses share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.stats import Stats

__all__ = [
    "HUGE",
    "KL_ESTIMATORS",
    "MAX_LOG_RATIO",
    "advantages",
    "bounded",
    "bounded_exp",
    "bounded_expm1",
    "choose",
    "chosen_nll",
    "clipped_surrogate",
    "difference",
    "kl_penalty",
    "log_ratio",
    "old_logp",
    "policy_logp",
    "quantile",
    "reinforce",
    "require_choice",
    "require_range",
    "sequence_log_ratio",
    "sigmoid_loss",
    "times_ratio",
    "weighted",
    "weighted_kl",
]

# exp of it is finite in float32 with room for a product
MAX_LOG_RATIO = 80.0
# exp of it is the largest float32
MAX_EXPONENT = math.log(torch.finfo(torch.float32).max)
# stands for infinity, so that a product with 0 is 0; its square is finite in float32
HUGE = 1e15
KL_ESTIMATORS = ("k1", "k2", "k3")


def policy_logp(stats: Stats) -> Tensor:
    """The policy's log-probs (N,), in float64: these are O(N) numbers, and products of them pass float32's range."""
    assert stats.logp is not None
    return stats.logp.double()


def old_logp(logp: Tensor, batch: Batch) -> Tensor:
    """Log-probs (N,) under the policy that sampled; without them the current ones, detached, so that the ratio is 1."""
    old = batch.token("old_logp")
    return logp.detach() if old is None else old.double()


def sequence_log_ratio(stats: Stats, batch: Batch) -> Tensor:
    """Log-ratio of each sequence to the reference, (B,) float64."""
    reference = batch.sequence("ref_logp")
    assert reference is not None
    return difference(batch.sum_per_sequence(policy_logp(stats)), reference)


def difference(left: Tensor, right: Tensor, limit: float = HUGE) -> Tensor:
    """``left - right`` of log-probs, clamped to +-limit (1e15); 0 where both are the same infinity."""
    found = left - right
    # equal, though their difference is not 0
    same = (left == right) != (found == 0)
    # where it is clamped it is constant: nothing there is differentiated
    clamped = found.detach().nan_to_num(nan=0.0).clamp(-limit, limit)
    return torch.where(same | (found.abs() > limit), clamped, found)


def log_ratio(logp: Tensor, other: Tensor) -> Tensor:
    """``logp - other``, clamped to +-80 so that its exponential stays finite."""
    return difference(logp, other, MAX_LOG_RATIO)


def kl_penalty(logp: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """A KL estimator per token (Schulman, "Approximating KL Divergence", 2020).

    With x = ref - logp: k1 = -x, k2 = x^2 / 2, k3 = e^x - 1 - x. Infinite x count as +-1e15, and k3 is constant where x
    lies above 80.
    """
    gap = difference(ref, logp)
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return 0.5 * gap.square()
    gap = torch.where(gap > MAX_LOG_RATIO, MAX_LOG_RATIO, gap)
    return torch.expm1(gap) - gap


def weighted_kl(logp: Tensor, ref: Tensor, old: Tensor, estimator: str) -> Tensor:
    """A KL estimator times r = pi / pi_old, per token.

    r k3 is e^(ref - old) - r (x + 1), whose derivative -r x has no exponential of x to lose its digits in. A token that
    one of the three gives no probability, or whose r lies above e^80, is no evidence and adds 0; e^(ref - old) is at
    most e^80.
    """
    gap, drift = difference(ref, logp), difference(logp, old)
    usable = (gap.abs() < HUGE) & (drift <= MAX_LOG_RATIO)
    ratio = torch.where(usable, drift, 0.0).exp()
    if estimator == "k1":
        value = -ratio * gap
    elif estimator == "k2":
        value = 0.5 * ratio * gap.square()
    else:
        value = difference(ref, old).clamp(max=MAX_LOG_RATIO).exp() - ratio * (gap + 1.0)
    return torch.where(usable, value, 0.0)


def times_ratio(values: Tensor, log_ratio: Tensor) -> Tensor:
    """``values * e^log_ratio`` per token, 0 where the ratio lies above e^80."""
    usable = log_ratio <= MAX_LOG_RATIO
    return torch.where(usable, values * torch.where(usable, log_ratio, 0.0).exp(), 0.0)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float, ceiling: float = math.inf) -> Tensor:
    """``-min(min(r, ceiling) A, clip(r, low, high) A)`` per token."""
    if ceiling < high:
        return -torch.minimum(ratio.clamp(max=ceiling) * advantage, ratio.clamp(low, high) * advantage)
    loss = (ratio if ceiling == math.inf else ratio.clamp(max=ceiling)) * -advantage
    # minus high A where A > 0, minus low A where A < 0
    bound = torch.minimum(-low * advantage, -high * advantage)
    return torch.where(bound > loss, bound, loss)


def reinforce(weight: Tensor, logp: Tensor, batch: Batch, shift: float = 0.0) -> Tensor:
    """``-stopgrad(weight) (A - shift) log pi`` per token."""
    return -weight.detach() * (advantages(batch) - shift) * bounded(logp, HUGE)


def chosen_nll(stats: Stats, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the loss tokens of the chosen half, ()."""
    return -batch.sum_tokens(torch.where(batch.chosen, policy_logp(stats), 0.0)) / batch.num_chosen_tokens


def sigmoid_loss(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-(1 - q) log sigmoid(x) - q log sigmoid(-x)``."""
    loss = -F.logsigmoid(logits)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


def advantages(batch: Batch) -> Tensor:
    """A per token, (N,) float64."""
    advantage = batch.token("advantage")
    assert advantage is not None
    return advantage.double()


def choose(condition: Tensor, yes: float, no: float) -> Tensor:
    """One of two numbers by a condition, in float64: ``torch.where`` of two numbers rounds them to float32."""
    return torch.where(condition, condition.new_full((), yes, dtype=torch.float64), no)


def weighted(values: Tensor, weight: Tensor) -> Tensor:
    """``values * weight``, 0 where the weight is 0 even if the value is infinite."""
    return torch.where(weight == 0, 0.0, values * weight)


def bounded(values: Tensor, limit: float) -> Tensor:
    """Clamp to +-limit; unlike ``clamp``, whose gradient hides a NaN, this keeps it."""
    return torch.where(values.abs() > limit, values.detach().clamp(-limit, limit), values)


def bounded_exp(values: Tensor, limit: float = MAX_EXPONENT) -> Tensor:
    """``e^x``, constant above the limit (88.7: the largest float32)."""
    return torch.exp(torch.where(values > limit, limit, values))


def bounded_expm1(values: Tensor, limit: float = MAX_EXPONENT) -> Tensor:
    """``e^x - 1``, constant above the limit."""
    return torch.expm1(torch.where(values > limit, limit, values))


def quantile(values: Tensor, members: Tensor, q: float) -> Tensor:
    """The q-quantile over the members, interpolated linearly as ``torch.quantile`` does: (N,), (N,) bool -> ().

    Sorts, so that neither the number of members is read on the host nor their count limited; +inf without a member.
    """
    if values.shape[0] == 0:
        return values.new_full((), torch.inf)
    ordered = torch.where(members, values, torch.inf).sort().values  # (N,)
    rank = (members.sum() - 1).clamp_min(0).double() * q
    # gathered, since an index that is a tensor would have to be known while tracing
    below, above = ordered.gather(0, torch.stack([rank.floor(), rank.ceil()]).long()).unbind()
    # two infinities: their difference is NaN
    return torch.where(below == above, below, below + (above - below) * (rank - rank.floor()).to(values.dtype))


def require_range(
    loss: object, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Check a hyper-parameter of a loss.

    Raises:
        ValueError: it is NaN or lies outside [low, high], or on an excluded end.
    """
    value = getattr(loss, name)
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside:
        brackets = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name} must lie in {brackets}, got {value}")


def require_choice(loss: object, name: str, choices: tuple[str, ...]) -> None:
    """Check a hyper-parameter of a loss that is one of a few words.

    Raises:
        ValueError: it is none of them.
    """
    value = getattr(loss, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
