"""What a loss does to the answers it is trained on: log-probs of both sides, squeezing, coefficients, offset.

Record the same examples at several checkpoints and take differences: the drift of ``logp`` says whether both sides
fall together, ``max_prob`` whether the mass that negative learning pushes away gathers on the likeliest token (the
squeezing effect, Ren and Sutherland, "Learning Dynamics of LLM Finetuning", arXiv 2407.10490).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_po.diagnostics.examples import Examples, StatsOf, require_loss_tokens
from fused_po.diagnostics.gradients import accumulators, gradients, inner, norm, trained
from fused_po.diagnostics.parts import take_apart
from fused_po.losses.contract import Loss
from fused_po.trainers.model import token_stats_of

__all__ = ["Dynamics", "Histogram", "learning_dynamics"]

SIDES = {"positive": 1, "negative": -1}
# of a histogram, as a share of the largest value
LEAST_WIDTH = 1e-6


@dataclass(frozen=True, repr=False)
class Histogram:
    """Counts of values between edges.

    Attributes:
        counts: (bins,) float64.
        edges: (bins + 1,) float64, from the smallest to the largest value; where all are alike to 1e-6 of the largest,
            around them at that distance.
    """

    counts: Tensor
    edges: Tensor

    def __repr__(self) -> str:
        low, high = self.edges[0].item(), self.edges[-1].item()
        return f"Histogram({self.counts.sum().item():.0f} values from {low:.6g} to {high:.6g}, {len(self.counts)} bins)"


@dataclass(frozen=True)
class Dynamics:
    """One moment. Sides are ``positive`` (chosen answers, positive advantages) and ``negative``; NaN where a side is
    empty.

    Attributes:
        logp: side -> mean over its answers of their summed log-prob, in nats; an answer with tokens of both sides (PPO)
            belongs to the one that most of them are on.
        token_logp: side -> mean log-prob of its tokens, in nats.
        max_prob: side -> mean over its tokens of the largest probability of any token.
        is_top1: side -> share of its tokens that are the likeliest.
        coefficients: side -> histogram of k = -dL/dlogp over its tokens: above 0 a step raises the log-prob.
        offset_cosine: cosine between the gradients of the positive and of the negative part in all trained parameters;
            -1 where they offset each other entirely, NaN where one is 0.
        offset_norms: side -> norm of its gradient.
    """

    logp: Mapping[str, float]
    token_logp: Mapping[str, float]
    max_prob: Mapping[str, float]
    is_top1: Mapping[str, float]
    coefficients: Mapping[str, Histogram]
    offset_cosine: float
    offset_norms: Mapping[str, float]

    def flat(self) -> dict[str, float]:
        """All numbers by name, ``logp/positive`` and so on, as trainers log them; no histograms."""
        found = {
            f"{name}/{side}": value
            for name in ("logp", "token_logp", "max_prob", "is_top1", "offset_norms")
            for side, value in getattr(self, name).items()
        }
        return found | {"offset_cosine": self.offset_cosine}


@torch.enable_grad()
def learning_dynamics(
    model: nn.Module,
    batches: Sequence[Examples],
    loss: Loss,
    *,
    bins: int = 40,
    stats: StatsOf = token_stats_of,
) -> Dynamics:
    """Measure a loss on examples at the model's parameters, which are left as they were, gradients included.

    Args:
        model: any module; its parameters that require a gradient count.
        batches: the examples; the loss is that of all of them as one call.
        loss: from ``fused_po.losses.create``.
        bins: of the histograms, 40.
        stats: as in ``gradient_alignment``.

    Raises:
        ValueError: examples without a loss token, a model without trainable parameters, ``bins`` below 1, missing
            side inputs.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1: got {bins}")
    require_loss_tokens("batches (D)", batches)
    parameters = trained(model)
    taken = take_apart(model, batches, loss, stats, ("max_logp", "is_top1"), ("whole", *SIDES))
    c, logp = taken.parts["whole"].logp, taken.stats.logp
    max_logp, top1 = taken.stats.max_logp, taken.stats.is_top1
    assert c is not None and logp is not None and max_logp is not None and top1 is not None
    table = torch.stack([logp.double(), max_logp.double().exp(), top1.double(), -c.double()])  # (4, N)
    summed = taken.batch.sum_per_sequence(logp.double())  # (B,)
    role = taken.batch.mean_per_sequence(taken.role.double())  # (B,)
    sums = {side: accumulators(parameters) for side in SIDES}
    for index, examples in enumerate(batches):
        given = stats(model, examples.inputs, examples.labels, loss.statistics)
        for side in SIDES:
            part = gradients(taken.weighted(index, given, side), parameters, keep=side != "negative")
            for name, grad in part.items():
                sums[side][name] += grad
    norms = {side: norm(found.values()) for side, found in sums.items()}
    between = sum(inner(sums["positive"][name], sums["negative"][name]) for name in parameters)
    product = norms["positive"] * norms["negative"]
    columns = {side: table[:, taken.role == sign].cpu() for side, sign in SIDES.items()}
    means = {side: found.mean(1).tolist() for side, found in columns.items()}
    return Dynamics(
        logp={side: summed[role * sign > 0].mean().item() for side, sign in SIDES.items()},
        token_logp={side: found[0] for side, found in means.items()},
        max_prob={side: found[1] for side, found in means.items()},
        is_top1={side: found[2] for side, found in means.items()},
        coefficients={side: _histogram(found[3], bins) for side, found in columns.items()},
        offset_cosine=between / product if product > 0 else math.nan,
        offset_norms=norms,
    )


def _histogram(values: Tensor, bins: int) -> Histogram:
    if values.numel() == 0:
        return Histogram(
            torch.zeros(bins, dtype=torch.float64), torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64)
        )
    values = values.double()
    low, high = values.min().item(), values.max().item()
    # edges between neighbouring numbers would be the same number
    room = LEAST_WIDTH * max(abs(low), abs(high)) or 0.5
    if high - low < room:
        middle = (low + high) / 2
        low, high = middle - room, middle + room
    return Histogram(*torch.histogram(values, bins, range=(low, high)))
