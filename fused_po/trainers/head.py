"""A model's head as the model used it: what logits are made from beside hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional

__all__ = ["Call", "ModelHead"]


@dataclass(frozen=True, eq=False)
class ModelHead:
    """``z = softcap tanh(logit_scale (h W^T + b) / softcap)``, in the terms of ``linear_loss``.

    Attributes:
        weight: (V, H), tied to the embeddings or not.
        bias: (V,) or None.
        softcap: None: there is none. What multiplies or divides logits after it, a temperature, is in it.
        logit_scale: what multiplies the raw logits, a temperature of the model's own among it.
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

    def multiplied(self, factor: float) -> ModelHead:
        """That of logits times a number."""
        cap = None if self.softcap is None else self.softcap * abs(factor)
        return replace(self, logit_scale=self.logit_scale * factor, softcap=cap)

    def with_tensors(self, weight: Tensor, bias: Tensor | None) -> ModelHead:
        return replace(self, weight=weight, bias=bias)

    def whole(self, layer: nn.Module) -> ModelHead:
        """Gathered, once for forward and backward, where FSDP2 has sharded it again since the model ran.

        Gradients are averaged over the ranks and go to the shards, as FSDP2's do.

        Args:
            layer: the model's output layer.
        """
        if not isinstance(layer.weight, DTensor) or self.weight.untyped_storage().size() > 0:
            return self
        shards: Any = layer
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight.requires_grad):
            bias = None if self.bias is None else _gathered(shards.bias, self.bias.dtype)
            return self.with_tensors(_gathered(shards.weight, self.weight.dtype), bias)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an output layer.

    Attributes:
        layer: the output layer.
        options: of ``linear_token_stats``.
        count: called once for each call of it.
        autocast: the dtype of the autocast in which the model ran, over by the time that logits are asked for; None:
            there was none.
        unknown: names of the operations that could not be followed.
    """

    layer: nn.Module
    options: Mapping[str, Any]
    count: Callable[[], None]
    autocast: torch.dtype | None = None
    unknown: list[str] = field(default_factory=list)

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast is None:
            # no autocast reaches tensors without values
            on = device.type != "meta" and torch.is_autocast_enabled(device.type)
            return torch.autocast(device.type, enabled=False) if on else nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


def _gathered(shard: Any, dtype: torch.dtype) -> Tensor:
    mesh = shard.device_mesh
    found: Tensor = shard.to(dtype).full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if found.requires_grad:
        found.register_hook(lambda grad: grad / mesh.size())
    return found
