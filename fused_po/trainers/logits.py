"""Trainers that ask a model for logits and take log-probs from them: their methods, wrapped so that none are made.

Within such a method the model's output layer returns ``DeferredLogits``. The model itself is called as ever, so
wrappers, and adapters behind the head, work as they did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_po.trainers.deferred import DeferredLogits, Head, made

__all__ = ["PREDICTION", "Methods", "deferring", "output_layer"]

# what it returns is gathered over ranks and handed to metrics: logits have to be there
PREDICTION = "prediction_step"


class Methods:
    """Methods of trainers that are replaced, to be put back by ``remove``.

    Args:
        options: of ``linear_token_stats``.
        count: called for each of its calls.
    """

    def __init__(self, options: Mapping[str, Any], count: Callable[[], None]) -> None:
        self._options, self._count = options, count
        self._replaced: dict[tuple[type, str], Any] = {}

    def wrap(self, trainer: type, names: tuple[str, ...]) -> None:
        """Those of the names that the class itself defines, and an inherited prediction step, once."""
        for name in names:
            own = vars(trainer).get(name)
            original = getattr(trainer, name) if name == PREDICTION else own
            if original is not None and (trainer, name) not in self._replaced:
                setattr(trainer, name, self._within(original))
                self._replaced[trainer, name] = own

    def remove(self) -> None:
        for (trainer, name), own in self._replaced.items():
            if own is None:
                delattr(trainer, name)
            else:
                setattr(trainer, name, own)
        self._replaced.clear()

    def _within(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values(), trainer.model, getattr(trainer, "ref_model", None)]
            with ExitStack() as stack:
                for model in given:
                    if isinstance(model, nn.Module):
                        stack.enter_context(self._deferred(model))
                found = method(trainer, *args, **kwargs)
                if method.__name__ != PREDICTION:
                    return found
                with torch.no_grad():
                    return pytree.tree_map(made, found)

        return call

    @contextmanager
    def _deferred(self, model: nn.Module) -> Iterator[None]:
        """The output layer of a model returns deferred logits within, where that can be done."""
        layer = output_layer(model)
        if layer is None or "forward" in vars(layer):
            yield
            return
        layer.forward = deferring(layer, self._options, self._count)  # type: ignore[assignment]
        try:
            yield
        finally:
            del layer.forward


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The head; None where it has an adapter, is sharded or compiled: logits are then made as ever."""
    found: Any = model
    while isinstance(getattr(found, "module", None), nn.Module):
        if type(found).__name__ in ("DataParallel", "FullyShardedDataParallel"):
            return None
        found = found.module
    if isinstance(found, torch._dynamo.OptimizedModule):
        return None
    found = found.get_base_model() if hasattr(found, "get_base_model") else found
    layer = found.get_output_embeddings() if hasattr(found, "get_output_embeddings") else None
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    sharded = hasattr(layer.weight, "ds_id") or hasattr(layer.weight, "full_tensor")
    return None if sharded or layer.weight.ndim != 2 else layer


def deferring(layer: nn.Linear, options: Mapping[str, Any], count: Callable[[], None]) -> Callable[[Tensor], Any]:
    """A ``forward`` for a model's output layer."""

    def forward(hidden: Tensor) -> DeferredLogits:
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        head = Head(layer.weight, layer.bias, options, count, autocast)
        return DeferredLogits(hidden, head, dtype=hidden.dtype)

    return forward
