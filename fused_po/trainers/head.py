"""A model's head as the model used it: what logits are made from beside hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Head"]


@dataclass(frozen=True, eq=False)
class Head:
    """``z = softcap tanh(logit_scale (h W^T + b) / softcap)``, in the terms of ``linear_loss``.

    What a model multiplies or divides its logits by, before its cap or after it, is in ``logit_scale`` and ``softcap``,
    a temperature too.

    Attributes:
        weight: (V, H), tied to the embeddings or not.
        bias: (V,) or None.
        softcap: None: there is none.
        logit_scale: what multiplies the raw logits.
        vocab_size: how many of the first classes the model keeps; None: all.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    vocab_size: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """All but the weight, as keyword arguments of the operations."""
        found: dict[str, Any] = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        return found if self.vocab_size is None else found | {"vocab_size": self.vocab_size}

    @property
    def classes(self) -> int:
        """How many logits a token has."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits from hidden states (..., H): (..., V)."""
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        raw = functional.linear(hidden, self.weight[: self.vocab_size], bias)
        raw = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)
