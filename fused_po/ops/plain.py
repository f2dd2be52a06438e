"""A loss through full logits and torch's own autograd: the baseline of comparisons, tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.losses.contract import Loss, total
from fused_po.ops.batches import Layout, Number, call_batch, masked_stats
from fused_po.ops.planning import static_plan
from fused_po.stats import Stats

__all__ = ["plain_loss", "plain_stats"]


def plain_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Stats:
    """All statistics by the textbook formulas, in the dtype of the logits, garbage where labels are ignored.

    Args:
        logits: (..., V), the raw output of the head.
        labels: (...) int64.
        temperature: a number, or anything that broadcasts to the shape of labels.
        softcap: as in ``linear_loss``.
        logit_scale: as in ``linear_loss``.
    """
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    column = labels.clamp_min(0).unsqueeze(-1)
    return Stats(
        logp=log_p.gather(-1, column).squeeze(-1),
        entropy=-torch.where(p > 0, p * log_p, 0.0).sum(-1),
        lse=torch.logsumexp(z, -1),
        mean_logit=z.mean(-1),
        is_top1=z.argmax(-1) == labels,
        log_sum_sq_probs=p.square().sum(-1).log(),
    )


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
    **side_inputs: Number,
) -> Tensor:
    """What ``linear_loss`` computes, from full logits (B, S, V) and by plain autograd.

    Returns:
        the loss, (), in float64.
    """
    loss.check(frozenset(side_inputs))
    layout = Layout.of(labels, static_plan(labels, packed=False))
    stats = plain_stats(logits, labels, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    flat = Stats(**{name: getattr(stats, name).reshape(-1) for name in loss.statistics})
    batch = call_batch(layout, side_inputs, num_items, num_sequences, logits.dtype)
    return total(loss(masked_stats(flat, layout.mask), batch))
