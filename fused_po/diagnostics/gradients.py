"""Gradients of scalars in a model's parameters: taken, added up, multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["accumulators", "gradients", "inner", "norm", "trained"]

# elements that are widened to float64 at once
WIDENED = 1 << 20


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("no parameter of the model requires a gradient")
    return found


def gradients(value: Tensor, parameters: Mapping[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
    """Of a scalar in each parameter that it depends on; ``keep`` keeps the graph."""
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=keep, allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def accumulators(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros to add gradients to, in float32 at least: a half loses what is added to a large sum."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }


def inner(one: Tensor, other: Tensor) -> float:
    """The inner product, summed in float64 without a wide copy of either."""
    found = torch.zeros((), dtype=torch.float64, device=one.device)
    for left, right in zip(one.reshape(-1).split(WIDENED), other.reshape(-1).split(WIDENED), strict=True):
        found += torch.dot(left.double(), right.double())
    return found.item()


def norm(tensors: Iterable[Tensor]) -> float:
    """Of all tensors together."""
    return sum(inner(t.detach(), t.detach()) for t in tensors) ** 0.5
