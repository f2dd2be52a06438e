"""A loss through full logits and torch's own autograd: the baseline of comparisons, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_po.losses.contract import Loss, total
from fused_po.ops.batches import Layout, Number, call_batch, masked_stats
from fused_po.ops.coefficients import coefficients
from fused_po.ops.declared import check_pattern
from fused_po.ops.planning import static_plan
from fused_po.stats import STATISTICS, Stats

__all__ = ["plain_loss", "plain_stats", "rounding"]


def plain_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = STATISTICS,
) -> Stats:
    """Statistics by the textbook formulas, in the dtype of the logits, garbage where labels are ignored.

    Args:
        logits: (..., V), the raw output of the head.
        labels: (...) int64.
        temperature: a number, or anything that broadcasts to the shape of labels.
        softcap: as in ``linear_loss``.
        logit_scale: as in ``linear_loss``.
        outputs: only these are computed, so that a comparison charges nothing that is not needed.
    """
    z = logits if logit_scale == 1.0 else logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        z = z / temperature.unsqueeze(-1)
    elif temperature != 1.0:
        z = z / temperature
    log_p = torch.log_softmax(z, -1)
    column = labels.clamp_min(0).unsqueeze(-1)
    formulas: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: log_p.gather(-1, column).squeeze(-1),
        "entropy": lambda: -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1),
        "lse": lambda: torch.logsumexp(z, -1),
        "mean_logit": lambda: z.mean(-1),
        "is_top1": lambda: z.argmax(-1) == labels,
        "log_sum_sq_probs": lambda: log_p.exp().square().sum(-1).log(),
        "max_logp": lambda: log_p.amax(-1),
    }
    return Stats(**{name: formulas[name]() for name in outputs})


def plain_loss(
    logits: Tensor,
    labels: Tensor,
    loss: Loss,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: Number | None = None,
    num_sequences: Number | None = None,
    num_chosen_items: Number | None = None,
    **side_inputs: Number,
) -> Tensor:
    """What ``linear_loss`` computes, from full logits (B, S, V) and by plain autograd.

    Returns:
        the loss, (), in float64.
    """
    loss.check(frozenset(side_inputs))
    layout = Layout.of(labels, static_plan(labels, packed=False))
    options: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        # what only metrics read is not charged to it
        "outputs": tuple(name for name in STATISTICS if name in loss.needs),
    }
    stats = plain_stats(logits, labels, **options)
    flat = Stats(**{name: value.reshape(-1) for name, value in stats.present().items()})
    batch = call_batch(layout, side_inputs, num_items, num_sequences, logits.dtype, num_chosen_items)
    return total(loss(masked_stats(flat, layout.mask), batch))


def rounding(stats: Stats, labels: Tensor, loss: Loss, **side_inputs: Number) -> tuple[float, float]:
    """What one ulp of float32 in the log-probs does to a loss, at worst: to its value, and to its coefficients.

    A loss may be a difference near 0 of large sums, or weigh its gradient by the ratio of a whole sequence; neither
    is known better than its log-probs are, whoever computes them.

    Args:
        stats: in the shape of labels, as ``linear_loss`` returns them.
        labels: (B, S).

    Returns:
        the change of the value, and that of dL/dlogp relative to its norm.

    Raises:
        ValueError: the loss has a wrong ``pattern``. The host waits here as it is.
    """
    layout = Layout.of(labels, static_plan(labels, packed=False))
    flat = {
        name: v.reshape(-1) if v.dtype == torch.bool else v.reshape(-1).double() for name, v in stats.present().items()
    }
    batch = call_batch(layout, side_inputs, None, None, torch.float64)
    ulp = torch.finfo(torch.float32).eps

    def at(scale: float) -> tuple[Tensor, Tensor]:
        moved = Stats(**{**flat, "logp": flat["logp"] * scale})
        value, found = coefficients(loss, masked_stats(moved, layout.mask), batch)
        assert found.logp is not None
        check_pattern(loss, found.logp, moved, batch, wait=True)
        return value, found.logp

    (value, c), (moved_value, moved_c) = at(1.0), at(1.0 + ulp)
    # all log-probs moved together, detached ones too; and each on its own, whatever cancels
    change = (moved_value - value).abs() + ulp * (c * flat["logp"]).abs().sum()
    return change.item(), ((moved_c - c).norm() / c.norm().clamp_min(1e-300)).item()
