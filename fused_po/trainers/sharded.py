"""Heads that are sharded over ranks by the time that logits are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from fused_po.trainers.head import Head

__all__ = ["whole"]


def whole(head: Head, layer: nn.Module) -> Head:
    """The head as the model used it, gathered where FSDP2 has freed it again since: once for forward and backward.

    Gradients are averaged over the ranks and go to the shards, as FSDP2's do.

    Args:
        head: as it was within the model.
        layer: the model's output layer.
    """
    if not isinstance(layer.weight, DTensor) or head.weight.untyped_storage().size() > 0:
        return head
    shards: Any = layer
    with torch.set_grad_enabled(torch.is_grad_enabled() and head.weight.requires_grad):
        weight = _gathered(shards.weight, head.weight.dtype)
        bias = None if head.bias is None else _gathered(shards.bias, head.bias.dtype)
    return replace(head, weight=weight, bias=bias)


def _gathered(shard: DTensor, dtype: torch.dtype) -> Tensor:
    mesh = shard.device_mesh
    found = shard.to(dtype).full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if found.requires_grad:
        found.register_hook(lambda grad: grad / mesh.size())
    return found
