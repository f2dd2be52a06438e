"""From a loss to its coefficients: the only place where losses are differentiated, and torch does it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_po.kernels.contract import Coefficients
from fused_po.losses.contract import Batch, Loss, total
from fused_po.stats import Stats

__all__ = ["coefficients"]


def coefficients(loss: Loss, stats: Stats, batch: Batch) -> tuple[Tensor, Coefficients]:
    """A loss's value and (c, e, l) = dL/d(logp, entropy, lse), DESIGN: "a preference loss is a set of coefficients".

    Args:
        loss: any loss.
        stats: packed statistics (N,).
        batch: the same tokens, whole horizons.

    Returns:
        the value, (), in float64, and the coefficients, (N,) each in the dtype of the statistics, None where the loss does not
        differentiate that statistic. Rows that carry no loss have coefficient 0.
    """

    def value(inputs: dict[str, Tensor]) -> Tensor:
        return total(loss(replace(stats, **inputs), batch))

    inputs = {name: getattr(stats, name) for name in loss.differentiates}
    gradients, result = torch.func.grad_and_value(value)(inputs)
    return result, Coefficients(**gradients)
