"""The gradients of hidden states, weight and bias while they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.kernels import library
from fused_po.kernels.contract import Coefficients
from fused_po.ops.head import Head

__all__ = ["Gradients", "Wanted", "add_scaled", "scaled", "storage_dtype"]


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
    """dH, dW and db.

    In float16 everything V-sized runs on coefficients divided by a power of two near their largest (at c near 1e-6
    the error of dW falls from 1.7e-2 to 2.3e-4); other dtypes have float32's range and need no scale.

    Args:
        wanted: which of them.
        hidden: the hidden states, (N, H) or (B, S, H).
        head: the head.
        stored: dtype of the weight, of which the head may hold a copy in another.
        parts: dW and db come in so many parts, whose sum they are.
        accumulate: several products add to dW, in the accumulation dtype; False: each of its elements is written
            once, in the dtype of the weight.
        covered: all of dH will be written, so that it need not be zeroed.
        into: (V, H) in the accumulation dtype, to which dW is added; then it is not returned.

    Attributes:
        hidden: (positions, H), or None.
        weights: one (V, H) per part; none where dW is not wanted.
        biases: one (V,) per part in the accumulation dtype likewise.
        started: products have been written to ``weights``, which hold anything before.
        scale: what ``weights`` and ``biases`` lack, (); None: nothing.
    """

    def __init__(
        self,
        wanted: Wanted,
        hidden: Tensor,
        head: Head,
        stored: torch.dtype,
        parts: int = 1,
        *,
        accumulate: bool = True,
        covered: bool = False,
        into: Tensor | None = None,
    ) -> None:
        self._wanted, self._like, self._head, self._covered = wanted, hidden, head, covered
        self.parts, self.accumulate = parts, accumulate or bool(head.max_dropped_mass) or into is not None
        wide = head.accumulation_dtype
        self.stored = wide if self.accumulate else stored
        self.hidden: Tensor | None = None
        self.weights: list[Tensor] = []
        self._into = into
        self.biases = [head.weight.new_zeros(head.columns, dtype=wide) for _ in range(parts if wanted.bias else 0)]
        self.started = False
        # normalised products can't be added to others
        if into is not None and head.compute_dtype != torch.float16:
            self.weights, self.started = [into], True
        self.scale: Tensor | None = None

    @property
    def hidden_wanted(self) -> bool:
        """dH is wanted."""
        return self._wanted.hidden

    @property
    def weight(self) -> bool:
        """dW is wanted."""
        return self._wanted.weight

    def place_hidden(self) -> Tensor:
        """dH, made where it is first asked for."""
        if self.hidden is None:
            shape = (self._like.shape[:-1].numel(), self._like.shape[-1])
            make = self._like.new_empty if self._covered else self._like.new_zeros
            self.hidden = make(shape, dtype=storage_dtype(self._like.dtype))
        return self.hidden

    def place_weights(self) -> list[Tensor]:
        """dW by parts, made where it is first asked for."""
        if not self.weights and self._wanted.weight:
            head = self._head
            # blocks that are left out write nothing
            make = head.weight.new_zeros if head.max_dropped_mass else head.weight.new_empty
            self.started = bool(head.max_dropped_mass)
            self.weights = [make(head.weight.shape, dtype=self.stored) for _ in range(self.parts)]
        return self.weights

    def normalised(self, coefficients: Coefficients) -> Coefficients:
        """The coefficients (R,) over the scale, which first grows to hold them."""
        given = [c for c in coefficients if c is not None and c.numel()]
        if self._head.compute_dtype != torch.float16 or not given:
            return coefficients
        top = torch.stack([c.abs().amax() for c in given]).amax()
        power = torch.exp2(torch.log2(top).ceil())
        before = torch.zeros_like(top) if self.scale is None else self.scale
        grown = torch.where(power.isfinite(), power, before).maximum(before)
        safe = torch.where(grown > 0, grown, 1.0)
        if self.scale is not None:
            for grad in (*(self.weights if self.started else ()), *self.biases):
                library.scale(grad, before / safe)
        self.scale = grown
        return Coefficients(*(None if c is None else c / safe for c in coefficients))

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dH, dW, db, the last two without ``scale``; what was never written is 0. With several parts the sums are new
        memory and the parts stay as they are.
        """
        if self._wanted.hidden and self.hidden is None:
            self._covered = False
            self.place_hidden()
        for grad in self.place_weights():
            if not self.started:
                grad.zero_()
        return self.hidden, _sum(self.weights), _sum(self.biases)

    def in_dtypes(self, dtypes: tuple[torch.dtype | None, ...]) -> tuple[Tensor | None, ...]:
        """``finish`` with nothing left to multiply, in these dtypes."""
        d_hidden, d_weight, d_bias = self.finish()
        if self._into is not None:
            if d_weight is not None and d_weight is not self._into:
                add_scaled(self._into, d_weight, self.scale)
            d_weight = None
        found = [None if d_hidden is None or dtypes[0] is None else d_hidden.to(dtypes[0])]
        for grad, dtype, lacks in ((d_weight, dtypes[1], self.accumulate), (d_bias, dtypes[2], True)):
            if self.scale is not None and lacks:
                found.append(scaled(grad, self.scale, dtype))
            else:
                found.append(None if grad is None or dtype is None else grad.to(dtype))
        return tuple(found)


def add_scaled(into: Tensor, grad: Tensor, factor: Tensor | None) -> None:
    """``into`` += a gradient times a number ()."""
    if factor is None:
        into.add_(grad)
    else:
        into.addcmul_(grad, factor.to(into.dtype))


def scaled(grad: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient times a number (), in the dtype of its parameter; in place where it has that already."""
    if grad is None or dtype is None:
        return None
    if grad.dtype == dtype or grad.device.type == "cpu":
        # on a CPU ``out`` of another dtype costs a buffer as large as the gradient
        library.scale(grad, factor)
        return grad.to(dtype)
    return torch.mul(grad, factor, out=grad.new_empty(grad.shape, dtype=dtype))


def _sum(parts: list[Tensor]) -> Tensor | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total
