"""The loss of a value head. It reads no log-prob, so it needs no coefficients: autograd differentiates it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["value_loss"]


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float | None = 0.2,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """PPO's clipped value loss: half the mean over tokens of ``max((v - R)^2, (clip(v, v_old +- cliprange_value) -
    R)^2)``.

    Source: the clipped value function of the PPO reference implementation (Schulman et al., arXiv 1707.06347), as TRL
    (before 1.13) and verl (``compute_value_loss``) compute it.

    Args:
        values: (B, S) or (N,), predictions; gradients flow through them alone.
        returns: the same shape, targets.
        old_values: the same shape, predictions when the data was sampled.
        mask: the same shape, bool, True where a token counts.
        cliprange_value: 0.2, how far a prediction may move; None: it is not clipped.
        num_items: what to divide by; default the number of tokens that count.

    Returns:
        (), float32 (float64 for float64); 0 where no token counts.

    Raises:
        ValueError: shapes that differ, a mask that is not bool, a clip range below 0.
    """
    for name, other in (("returns", returns), ("old_values", old_values), ("mask", mask)):
        if other.shape != values.shape:
            raise ValueError(f"{name} must have the shape of values, {tuple(values.shape)}: got {tuple(other.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool: got {mask.dtype}")
    if cliprange_value is not None and not cliprange_value >= 0:
        raise ValueError(f"cliprange_value must be at least 0: got {cliprange_value}")
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    values, target, old = values.to(wide), returns.detach().to(wide), old_values.detach().to(wide)
    # what stands at masked positions must not reach a gradient, not even as 0 * nan
    values, target, old = (torch.where(mask, t, 0.0) for t in (values, target, old))
    error = (values - target).square()
    if cliprange_value is not None:
        near = torch.minimum(torch.maximum(values, old - cliprange_value), old + cliprange_value)
        error = torch.maximum(error, (near - target).square())
    count = mask.sum().clamp_min(1) if num_items is None else num_items
    return 0.5 * error.sum() / count
