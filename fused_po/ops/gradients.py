"""Accumulators of the gradients of hidden states, weight and bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.kernels.contract import Coefficients
from fused_po.ops.head import Head

__all__ = ["Gradients", "Wanted", "storage_dtype"]


@dataclass(frozen=True)
class Wanted:
    """Which gradients a call must produce."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.head

    @property
    def head(self) -> bool:
        """The head itself is trained, so tiles are needed once the coefficients are known."""
        return self.weight or self.bias


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype dH waits for backward: float16 would underflow before the loss scale is applied."""
    return torch.float32 if dtype == torch.float16 else dtype


class Gradients:
    """dH, dW and db while they accumulate; one that is not wanted is None.

    In float16 everything V-sized runs on coefficients divided by a power of two near their largest (at c near 1e-6
    the error of dW falls from 1.7e-2 to 2.3e-4); other dtypes have float32's range and need no scale.

    Attributes:
        hidden: (positions, H) in ``storage_dtype``.
        weight: (V, H) in the accumulation dtype.
        bias: (V,) likewise.
    """

    def __init__(self, wanted: Wanted, hidden: Tensor, head: Head) -> None:
        wide, weight = head.accumulation_dtype, head.weight
        self.hidden = hidden.new_zeros(hidden.shape, dtype=storage_dtype(hidden.dtype)) if wanted.hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=wide) if wanted.weight else None
        self.bias = weight.new_zeros(head.vocab_size, dtype=wide) if wanted.bias else None
        self._scale = weight.new_zeros((), dtype=wide) if head.compute_dtype == torch.float16 else None

    def normalised(self, coefficients: Coefficients) -> Coefficients:
        """The coefficients (R,) over the scale, which first grows to hold them."""
        given = [c for c in coefficients if c is not None and c.numel()]
        if self._scale is None or not given:
            return coefficients
        top = torch.stack([c.abs().amax() for c in given]).amax()
        power = torch.exp2(torch.log2(top).ceil())
        grown = torch.where(power.isfinite(), power, self._scale).maximum(self._scale)
        safe = torch.where(grown > 0, grown, 1.0)
        for grad in (self.weight, self.bias):
            if grad is not None:
                grad.mul_(self._scale / safe)
        self._scale = grown
        return Coefficients(*(None if c is None else c / safe for c in coefficients))

    def restored(self, product: Tensor) -> Tensor:
        """A product of normalised coefficients, in place, without the normalisation."""
        return product if self._scale is None else product.mul_(self._scale)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dH, dW, db."""
        for grad in (self.weight, self.bias):
            if grad is not None and self._scale is not None:
                grad.mul_(self._scale)
        return self.hidden, self.weight, self.bias
