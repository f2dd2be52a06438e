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
        weights: one (V, H) per part in the accumulation dtype, whose sum is dW; none where dW is not wanted.
        biases: one (V,) per part likewise.
    """

    def __init__(self, wanted: Wanted, hidden: Tensor, head: Head, parts: int = 1) -> None:
        wide, weight = head.accumulation_dtype, head.weight
        self.parts = parts
        positions = (hidden.shape[:-1].numel(), hidden.shape[-1])
        self.hidden = hidden.new_zeros(positions, dtype=storage_dtype(hidden.dtype)) if wanted.hidden else None
        self.weights = [weight.new_zeros(weight.shape, dtype=wide) for _ in range(parts if wanted.weight else 0)]
        self.biases = [weight.new_zeros(head.columns, dtype=wide) for _ in range(parts if wanted.bias else 0)]
        self._scale = weight.new_zeros((), dtype=wide) if head.compute_dtype == torch.float16 else None

    def add_head(
        self,
        head: Head,
        tile: Tensor,
        rows: Tensor | None,
        scalar: Tensor | None,
        groups: Tensor | None,
        kept: Tensor | None = None,
    ) -> None:
        """GEMM 3 of a gradient tile (R, V), each row into its part.

        Args:
            rows: (R, H), hidden states times the coefficient that is not in the tile; None where dW is not wanted.
            scalar: (R,), that coefficient; None: all 1.
            groups: (R,) int64, the part of each row; None: all in the first.
            kept: the blocks of the tile that count for dW; None: all. Not together with groups.
        """
        for part in range(self.parts):
            own = slice(None) if groups is None else (groups == part).nonzero().squeeze(1)
            mine = tile if isinstance(own, slice) else tile.index_select(0, own)
            if not mine.shape[0]:
                continue
            if self.weights and rows is not None:
                head.add_weight_grad(self.weights[part], mine, rows[own], kept)
            if self.biases:
                head.add_bias_grad(self.biases[part], mine, None if scalar is None else scalar[own])

    def normalised(self, coefficients: Coefficients) -> Coefficients:
        """The coefficients (R,) over the scale, which first grows to hold them."""
        given = [c for c in coefficients if c is not None and c.numel()]
        if self._scale is None or not given:
            return coefficients
        top = torch.stack([c.abs().amax() for c in given]).amax()
        power = torch.exp2(torch.log2(top).ceil())
        grown = torch.where(power.isfinite(), power, self._scale).maximum(self._scale)
        safe = torch.where(grown > 0, grown, 1.0)
        for grad in (*self.weights, *self.biases):
            grad.mul_(self._scale / safe)
        self._scale = grown
        return Coefficients(*(None if c is None else c / safe for c in coefficients))

    def restored(self, product: Tensor) -> Tensor:
        """A product of normalised coefficients, in place, without the normalisation."""
        return product if self._scale is None else product.mul_(self._scale)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dH, dW, db. With several parts the sums are new memory and the parts stay as they are."""
        if self._scale is not None:
            for grad in (*self.weights, *self.biases):
                grad.mul_(self._scale)
        return self.hidden, _sum(self.weights), _sum(self.biases)


def _sum(parts: list[Tensor]) -> Tensor | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total
