"""What every backend computes, in one place: the logit transform, the partial statistics of a row and how they merge.

With raw head outputs ``x`` (N, V), the logits are ``z = softcap tanh(logit_scale x / softcap) / T`` and ``p =
softmax(z)``.
A backend is a module with three functions that work row by row (they know tokens and vocabularies, never a loss):

``row_stats(x, labels, transform, span, outputs) -> partials``
    partial statistics over the columns of ``x``; ``x`` is left alone.
``row_grad(x, labels, transform, span, anchors, coefficients, out)``
    ``out <- dL/dx`` from the ``ANCHORS`` of the rows and the coefficients (c, e, l) = dL/d(logp, entropy, lse);
    ``out`` may be ``x``.
``row_softmax(x, labels, transform, span, outputs, out) -> partials``
    ``out <- G = d logp / dx = (1[v = y] - p) J`` with the statistics of the same sweep; ``out`` may be ``x``.

and ``unsupported(kernel, x) -> str | None``, the reason in words why it can't run a case. Triton and the reference also
have

``row_regrad(tile, labels, transform, span, anchors, coefficients)``
    G, in ``tile``, becomes ``dL/dx``, where the slope J is one number a row: without a softcap.

Columns stand for the classes ``[span.start, span.stop)``; further columns of ``x`` are padding (no probability,
gradient 0). A vocabulary tile, a padded tail and one rank's shard of the head are therefore the same thing.

A row whose label is negative carries no loss: it is not read, its gradient is 0, its partials are undefined and
finish as NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_po.stats import STATISTICS, Stats

__all__ = ["ANCHORS", "PARTIALS", "Coefficients", "Span", "Transform", "accumulation_dtype", "finish", "merge"]

# rows of the partials tensor: max and sum of e^{z-max} over the classes other than the target, the target's logit,
# sum e^{z-max}(z-max), sum e^{2(z-max)}, sum of z over all classes; before says who wins a tie: it is the max over the
# classes before the target, or just max where there are such classes and none of the columns ties with the target
PARTIALS = ("max", "sum", "target", "weighted", "square", "total", "before")

# stands for minus infinity, so that a product with 0 is 0; times the size of a vocabulary it is finite in float32
LEAST = -1e30

# rows of the anchors tensor, what turns the logits of a row back into probabilities: log p_y, and shift and gap with
# log p_v = (z_v - shift) + gap, which keeps its digits where all logits are far from 0 and z_v - lse does not; entropy
ANCHORS = ("logp", "shift", "gap", "entropy")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Transform:
    """From raw head output to logits: ``z = softcap tanh(logit_scale x / softcap) / T``, without softcap ``z =
    logit_scale x / T``.

    ``temperatures``, one T per row (N,) in the accumulation dtype, replaces ``temperature`` where given.
    """

    temperature: float = 1.0
    temperatures: Tensor | None = None  # (N,)
    softcap: float | None = None
    logit_scale: float = 1.0


class Span(NamedTuple):
    """The classes [start, stop) that the leading columns of ``x`` stand for."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


class Coefficients(NamedTuple):
    """(c, e, l) = dL/d(logp, entropy, lse), each (N,) in the accumulation dtype; None means exactly 0."""

    logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None


def merge(parts: Tensor) -> Tensor:
    """Merge the partials of disjoint column sets of the same rows.

    Args:
        parts: (P, 7, N), one block of ``PARTIALS`` per column set.

    Returns:
        (7, N). A part without any class other than the target (max = -inf) does not count.
    """
    top, total, _, weighted, square, summed, _ = parts.unbind(1)  # (P, N) each
    # of which the sums are not used
    best, _, target, _, _, _, before = parts.amax(0)  # (N,) each
    # -inf - -inf would be NaN, and so would -inf times the sum of nothing
    shift = (top - best.clamp_min(torch.finfo(parts.dtype).min)).clamp_min(LEAST)  # (P, N)
    scale = shift.exp()
    return torch.stack(
        [
            best,
            (scale * total).sum(0),
            target,
            (scale * torch.addcmul(weighted, shift, total)).sum(0),
            (scale * scale * square).sum(0),
            summed.sum(0),
            before,
        ]
    )


def finish(partials: Tensor, labels: Tensor, vocab_size: int, outputs: tuple[str, ...]) -> tuple[Stats, Tensor]:
    """Turn merged partials into statistics and anchors, exact in the tails.

    With s, m over the classes other than the target, ``d = log s + m - z_y`` and ``logp = -softplus(d)`` keep full
    precision where ``z_y - lse`` would round to 0. These are O(N) numbers, so they run in float64.

    Args:
        partials: (7, N), the whole vocabulary.
        labels: (N,) int64. A label outside [0, vocab_size) makes its row NaN.
        vocab_size: number of classes.
        outputs: names from ``STATISTICS``.

    Returns:
        the statistics asked for, and the ``ANCHORS`` (4, N), whose entropy is 0 unless that was asked for; in the
        dtype of the partials.
    """
    top, total, target, weighted, square, summed, before = partials.double().unbind(0)  # (N,) each
    legal = labels.clamp(0, vocab_size - 1) == labels
    # NaN from here on: whatever is made of the target of an illegal label
    target = torch.where(legal, target, torch.nan)
    # at least 1 where there is a class other than the target
    total = total.clamp_min(1.0)
    log_total = total.log()
    # the target first: log s would drown in logits far from 0; finite where there is no other class
    margin = ((top - target) + log_total).clamp_min(LEAST)
    logp = logsigmoid(-margin)
    gap = logsigmoid(margin) - log_total
    # where there is no other class, a finite number: -inf - -inf would be NaN
    shift = top.clamp_min(torch.finfo(partials.dtype).min)
    found: dict[str, Tensor] = {}
    if "logp" in outputs:
        found["logp"] = logp
    if "entropy" in outputs:
        # p log p is 0 where p is, and 1 - p_y = sigmoid(d): no cancellation at either end
        own = logp.exp() * logp.clamp_min(LEAST)
        others = torch.addcdiv(gap, weighted, total)
        found["entropy"] = -torch.addcmul(own, torch.sigmoid(margin), others)
    if "lse" in outputs:
        found["lse"] = torch.logaddexp(target, top + log_total)
    if "mean_logit" in outputs:
        found["mean_logit"] = torch.where(legal, summed / vocab_size, torch.nan)
    if "log_sum_sq_probs" in outputs:
        found["log_sum_sq_probs"] = torch.logaddexp(square.log() + 2 * gap, 2 * logp)
    if "max_logp" in outputs:
        # gap is that of the best class other than the target
        found["max_logp"] = torch.maximum(gap, logp)
    entropy = found["entropy"] if "entropy" in found else torch.zeros_like(logp)
    stats = {name: value.to(partials.dtype) for name, value in found.items()}
    if "is_top1" in outputs:
        stats["is_top1"] = (target >= top) & (target > before)
    anchors = torch.stack([logp, shift, gap, entropy]).to(partials.dtype)
    return Stats(**{name: stats[name] for name in STATISTICS if name in stats}), anchors
