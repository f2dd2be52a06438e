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
        the value, (), in float64, and the coefficients, (N,) each in the dtype of the statistics, None where the loss
        does not differentiate that statistic. Rows that carry no loss have coefficient 0.
    """

    def value(inputs: dict[str, Tensor]) -> Tensor:
        return total(loss(replace(stats, **inputs), batch))

    inputs = {name: getattr(stats, name) for name in loss.differentiates}
    if torch.compiler.is_compiling():
        # traces inside an autograd.Function, which torch.autograd.grad does not
        gradients, result = torch.func.grad_and_value(value)(inputs)
        return result, Coefficients(**gradients)
    # the caller may offload or checkpoint saved tensors: not these, and torch.func refuses such hooks
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        result = value(leaves)
        found = torch.autograd.grad(result, list(leaves.values()), materialize_grads=True)
    return result.detach(), Coefficients(**dict(zip(leaves, found, strict=True)))


def _same(tensor: Tensor) -> Tensor:
    return tensor
