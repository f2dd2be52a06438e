"""The seam of a model: its own output layer, whose product with its weight is put off while the model runs.

The model is called as ever, so that wrappers, hooks and adapters work as they do.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.head import Call, Head

__all__ = ["Replaced", "deferred", "output_layer", "putting_off", "standing_in"]


def output_layer(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The outermost module within a model that names an output layer, and that layer.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        # by its class: wrappers pass on what they do not have
        has: Any = module if hasattr(type(module), "get_output_embeddings") else None
        layer = None if has is None else has.get_output_embeddings()
        if isinstance(layer, nn.Module):
            return module, layer
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    raise ValueError(f"{type(inner).__name__} has no output layer: a causal language model is wanted")


class Replaced:
    """Stands as ``forward`` of an output layer for a while, before the one that it has.

    Args:
        layer: the output layer.
        instead: called with the layer, its own forward and what the forward is called with.
    """

    def __init__(self, layer: nn.Module, instead: Callable[..., Any]) -> None:
        self.layer, self.own, self.instead = layer, layer.forward, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.instead(self.layer, self.own, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        """A copy of the model is not within the seam."""
        if isinstance(self.own, MethodType) and self.own.__self__ is self.layer:
            return MethodType(self.own.__func__, copy.deepcopy(self.layer, memo))
        return copy.deepcopy(self.own, memo)


@contextmanager
def standing_in(layer: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """``instead`` is called for the layer's forward within, see ``Replaced``."""
    had = "forward" in vars(layer)
    replaced = Replaced(layer, instead)
    layer.forward = replaced
    try:
        yield
    finally:
        if had:
            layer.forward = replaced.own
        else:
            del layer.forward


@contextmanager
def deferred(
    model: nn.Module, options: Mapping[str, Any] | None = None, count: Callable[[], None] = lambda: None
) -> Iterator[list[Call]]:
    """The output layer of a model returns ``DeferredLogits`` within, where that can be done; one warning where not.

    Args:
        model: any that has an output layer, wrapped or not; without one nothing happens.
        options: of ``linear_token_stats``.
        count: called for each of its calls.

    Yields:
        a list that calls of the layer are added to.
    """
    calls: list[Call] = []
    try:
        _, layer = output_layer(model)
    except ValueError:
        yield calls
        return
    if isinstance(layer.forward, Replaced):
        yield calls
    elif any(isinstance(module, (nn.DataParallel, FullyShardedDataParallel)) for module in model.modules()):
        warnings.warn(
            "full logits are made: DataParallel's copies and FSDP's first version keep no head for them to wait with; "
            "DDP, FSDP2 and ZeRO-3 do",
            stacklevel=3,
        )
        yield calls
    else:
        with standing_in(layer, putting_off(options or {}, count, calls)):
            yield calls


def putting_off(options: Mapping[str, Any], count: Callable[[], None], calls: list[Call]) -> Callable[..., Any]:
    """What an output layer does instead of its product: see ``Replaced``."""

    def instead(layer: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = Call(layer, options, count)
        with _PutOff(call, calls):
            return own(*args, **kwargs)

    return instead


class _PutOff(TorchFunctionMode):
    """The product with an output layer's own weight is not computed within, but remembered."""

    def __init__(self, call: Call, calls: list[Call]) -> None:
        super().__init__()
        self.call, self.calls = call, calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear and not kwargs and args[1] is self.call.layer.weight:
            hidden, weight = args[:2]
            if weight.ndim == 2 and not isinstance(hidden, DTensor) and not isinstance(weight, DTensor):
                return self.logits(*args)
        return function(*args, **(kwargs or {}))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> DeferredLogits:
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # views: DDP looks for the graph behind an output, and ZeRO-3 empties the parameter itself
        head = Head(weight.view_as(weight), None if bias is None else bias.view_as(bias))
        call = replace(self.call, autocast=autocast)
        self.calls.append(call)
        return DeferredLogits(hidden, head, call, dtype=autocast or hidden.dtype)
