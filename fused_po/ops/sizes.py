"""What the route of a call follows from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_po.kernels import library
from fused_po.kernels.contract import accumulation_dtype
from fused_po.kernels.select import requested_backend
from fused_po.ops.gradients import Wanted
from fused_po.ops.head import Head

__all__ = ["Sizes", "default_scratch"]


def default_scratch(device: str) -> int:
    """Bytes of the budget where a call names none, by the type of its device."""
    return 96 << 20 if device == "cpu" else 1 << 30


@dataclass(frozen=True)
class Sizes:
    """Of a call.

    Attributes:
        hidden: H.
        vocab: V, rows of the weight.
        compute: dtype of operands and gradient tiles.
        stored: dtype of the weight.
        wanted: which gradients.
        scratch: bytes of the budget.
        hides: G does not give the probabilities back: there is a softcap, it is as wide as the logits, whose digits it
            lacks near p = 1, or a named backend can't turn it.
        drops: negligible blocks of gradients are left out.
        adds: dW goes into memory that the caller holds.
    """

    hidden: int
    vocab: int
    compute: torch.dtype
    stored: torch.dtype
    wanted: Wanted
    scratch: int
    hides: bool = False
    drops: bool = False
    adds: bool = False

    @staticmethod
    def of(head: Head, wanted: Wanted, scratch: int, adds: bool) -> Sizes:
        """The sizes of a call on a head."""
        vocab, hidden = head.weight.shape
        turns = requested_backend(head.backend) in (None, *library.REGRAD_BACKENDS)
        hides = head.softcap is not None or head.compute_dtype == head.accumulation_dtype or not turns
        drops = bool(head.max_dropped_mass)
        return Sizes(hidden, vocab, head.compute_dtype, head.weight.dtype, wanted, scratch, hides, drops, adds)

    @property
    def wide(self) -> int:
        """Bytes of a logit, a statistic or an accumulated element."""
        return accumulation_dtype(self.compute).itemsize

    @property
    def narrow(self) -> int:
        """Bytes of an operand or an element of a gradient tile."""
        return self.compute.itemsize

    @property
    def returned(self) -> int:
        """Bytes of dW as it is returned."""
        return self.vocab * self.hidden * self.stored.itemsize if self.wanted.weight and not self.adds else 0

    @property
    def accumulator(self) -> int:
        """Bytes of dW in the accumulation dtype, where it is not returned in that."""
        narrower = self.stored.itemsize < self.wide
        return self.vocab * self.hidden * self.wide if self.wanted.weight and narrower else 0

    @property
    def copied(self) -> int:
        """Bytes of the copy of the weight in the compute dtype, where that is narrower."""
        return self.vocab * self.hidden * self.narrow if self.stored.itemsize > self.narrow else 0
