"""The seam of a model: its own output layer, whose product with its weight is put off while the model runs.

The model is called as ever, so that wrappers, hooks and adapters work as they do.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fused_po.ops.devices import stands_for
from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.head import Call, ModelHead

__all__ = ["Calls", "calls_of", "deferred", "output_layer", "putting_off", "standing_in"]


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


class Calls(list[Call]):
    """The calls of an output layer within a seam.

    Attributes:
        why: what keeps the layer from putting its product off, or "".
    """

    why: str = ""


class Replaced:
    """Stands as ``forward`` of an output layer while a thread is within its seam, and answers for that thread alone.

    There is one for each layer: what is compiled with it stays compiled.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.had, self.open = ref(layer), False, 0
        self.own: Any = None
        self.here = threading.local()
        self.answer = torch.compiler.disable(_answer)

    @property
    def seam(self) -> tuple[Callable[..., Any] | None, Calls | None]:
        """What this thread puts in place of the layer's forward, and the calls that it keeps."""
        return getattr(self.here, "seam", (None, None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        """A copy of the model is not within the seam."""
        own, layer = self.own, self.layer()
        if isinstance(own, MethodType) and own.__self__ is layer:
            return MethodType(own.__func__, copy.deepcopy(layer, memo))
        return copy.deepcopy(own, memo)


_replaced: WeakKeyDictionary[nn.Module, Replaced] = WeakKeyDictionary()
_lock = threading.Lock()


def _answer(replaced: Replaced, *args: Any, **kwargs: Any) -> Any:
    layer: Any = replaced.layer()
    # another thread may have left the seam since this one looked the forward up
    own, instead = replaced.own or layer.forward, replaced.seam[0]
    return own(*args, **kwargs) if instead is None else instead(layer, own, *args, **kwargs)


@contextmanager
def standing_in(layer: nn.Module, instead: Callable[..., Any], calls: Calls | None = None) -> Iterator[None]:
    """``instead`` is called for the layer's forward within, in this thread.

    Args:
        layer: the output layer.
        instead: called with the layer, its own forward and what the forward is called with.
        calls: of the seam, see ``calls_of``.
    """
    with _lock:
        replaced = _replaced.setdefault(layer, Replaced(layer))
        if replaced.open == 0:
            replaced.had, replaced.own = "forward" in vars(layer), layer.forward
            layer.forward = replaced
        replaced.open += 1
    here = replaced.here
    before = replaced.seam
    here.seam = instead, calls
    try:
        yield
    finally:
        here.seam = before
        with _lock:
            replaced.open -= 1
            if replaced.open == 0:
                if replaced.had:
                    layer.forward = replaced.own
                else:
                    del layer.forward
                replaced.own = None


def calls_of(layer: nn.Module) -> Calls | None:
    """Those of the seam of a layer that this thread is within; None: it is in none."""
    replaced = _replaced.get(layer)
    return None if replaced is None else replaced.seam[1]


@contextmanager
def deferred(
    model: nn.Module,
    options: Mapping[str, Any] | None = None,
    count: Callable[[], None] = lambda: None,
    *,
    within: bool = False,
) -> Iterator[Calls]:
    """The output layer of a model returns ``DeferredLogits`` within, where that can be done; one warning where not.

    Args:
        model: any that has an output layer, wrapped or not; without one nothing happens.
        options: of ``linear_token_stats``.
        count: called for each of its calls.
        within: whether a forward of the model goes on until the logits have been used, so that FSDP's first version
            has a head whole that the model itself holds.

    Yields:
        a list that calls of the layer are added to: within a seam of this thread, that seam's.
    """
    try:
        layer: nn.Module | None = output_layer(model)[1]
    except ValueError:
        layer = None
    outer = None if layer is None else calls_of(layer)
    calls = Calls() if outer is None else outer
    if layer is None or outer is not None:
        yield calls
        return
    copied = any(isinstance(module, nn.DataParallel) for module in model.modules())
    sharded = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    if copied or any(not within or layer in set(module.modules()) for module in sharded):
        calls.why = "DataParallel's copies and FSDP's first version keep no head for them to wait with"
        warnings.warn(f"full logits are made: {calls.why}; DDP, FSDP2 and ZeRO-3 do", stacklevel=3)
        yield calls
    else:
        with standing_in(layer, putting_off(options or {}, count, calls), calls):
            yield calls


def putting_off(options: Mapping[str, Any], count: Callable[[], None], calls: Calls) -> Callable[..., Any]:
    """What an output layer does instead of its product: see ``standing_in``."""

    def instead(layer: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        product = _PutOff(Call(layer, options, count), calls)
        # also where DeepSpeed has its own function for the product
        if getattr(own, "__func__", None) is nn.Linear.forward:
            (hidden,) = *args, *kwargs.values()
            if product.fits(hidden, layer.weight):
                return product.logits(hidden, layer.weight, layer.bias)
        with product:
            found = own(*args, **kwargs)
        if not product.caught:
            kind = type(layer).__name__
            warnings.warn(f"full logits are made: {kind} multiplies by no weight of its own", stacklevel=3)
        return found

    return instead


class _PutOff(TorchFunctionMode):
    """The product with an output layer's own weight is not computed within, but remembered."""

    def __init__(self, call: Call, calls: Calls) -> None:
        super().__init__()
        self.call, self.calls, self.caught = call, calls, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if function is functional.linear and self.fits(given["input"], given["weight"]):
            return self.logits(given["input"], given["weight"], given.get("bias"))
        return function(*args, **(kwargs or {}))

    def fits(self, hidden: Tensor, weight: Tensor) -> bool:
        whole = weight.ndim == 2 and not isinstance(hidden, DTensor) and not isinstance(weight, DTensor)
        return whole and weight is self.call.layer.weight

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> DeferredLogits:
        layer: Any = self.call.layer
        kind = stands_for(hidden)
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if hasattr(layer, "pre_bwd_fn") and hidden.requires_grad:
            # ZeRO-3 finds no tensor in what the layer returns, and waits for the backward of one
            hidden = layer.pre_bwd_fn.apply(hidden)
        head = ModelHead(_AtHand.apply(weight), None if bias is None else _AtHand.apply(bias))
        call = replace(self.call, autocast=autocast)
        self.calls.append(call)
        self.caught = True
        return DeferredLogits(hidden, head, call, dtype=autocast or hidden.dtype)


class _AtHand(torch.autograd.Function):
    """A parameter as it is now: DDP looks for the graph behind an output, and ZeRO-3 empties the parameter itself."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # ZeRO-3 takes the gradient of a whole parameter, and shards it again behind the layer
        if hasattr(ctx.parameter, "ds_id"):
            ctx.parameter.all_gather([ctx.parameter])
        return gradient
