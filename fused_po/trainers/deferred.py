"""Logits that are not there yet: what a head returns while a trainer works out log-probs.

Many trainers take log-probs from a model's logits. ``DeferredLogits`` stands for those: it remembers hidden states
and head, follows slices, scales and soft caps, and answers log-probs, entropies and means from
``linear_token_stats``. Whatever else is asked of it makes the logits, so that nothing can come out wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real
from operator import methodcaller
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_po.ops import linear_token_stats
from fused_po.ops.checks import IGNORE

__all__ = ["DeferredLogits", "Head", "made"]

OUTPUTS = ("logp", "entropy", "mean_logit")
# elements of logits at a time where they are looked at row by row
ROW_ELEMENTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Head:
    """What logits are made from beside hidden states.

    Attributes:
        weight, bias: (V, H), (V,) or None.
        options: of ``linear_token_stats``.
        count: called once for each call of it.
        autocast: the dtype of the autocast in which the model ran, over by the time that logits are asked for; None:
            there was none.
    """

    weight: Tensor
    bias: Tensor | None
    options: Mapping[str, Any]
    count: Callable[[], None]
    autocast: torch.dtype | None = None

    def precision(self) -> AbstractContextManager[Any]:
        kind = self.weight.device.type
        return nullcontext() if self.autocast is None else torch.autocast(kind, dtype=self.autocast)

    def detach(self) -> Head:
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


@dataclass(eq=False)
class DeferredLogits:
    """``z = scale x``, or ``cap tanh(scale x)``, of raw head outputs x = h W^T + b.

    Attributes:
        hidden: (..., H).
        head: the rest.
        scale, cap: numbers; None: no soft cap.
        dtype: of the logits, once they are made.
        known: statistics of each row that have been worked out, (...).
    """

    hidden: Tensor
    head: Head
    scale: float = 1.0
    cap: float | None = None
    dtype: torch.dtype | None = None
    known: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.weight.shape[0]))

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad or self.head.weight.requires_grad

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    # what logits are made of, followed

    def __getitem__(self, index: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        taken = sum(_dimensions(item) for item in items)
        if any(item is Ellipsis for item in items):
            place = next(i for i, item in enumerate(items) if item is Ellipsis)
            items = (*items[:place], *[slice(None)] * (self.ndim - taken), *items[place + 1 :])
            taken = self.ndim
        if taken == self.ndim:
            if not (isinstance(items[-1], slice) and items[-1] == slice(None)):
                return self.made()[index]
            items = items[:-1]
        return self._rows(lambda tensor: tensor[items])

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Any, ...]:
        return self._parts("chunk", chunks, dim)

    def split(self, split_size: Any, dim: int = 0) -> tuple[Any, ...]:
        return self._parts("split", split_size, dim)

    def _parts(self, method: str, size: Any, dim: int) -> tuple[Any, ...]:
        cut: Any = methodcaller(method, size, dim % self.ndim)
        if dim % self.ndim == self.ndim - 1:
            return tuple(cut(self.made()))
        known = {name: cut(value) for name, value in self.known.items()}
        return tuple(
            replace(self, hidden=part, known={name: parts[i] for name, parts in known.items()})
            for i, part in enumerate(cut(self.hidden))
        )

    def reshape(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        if not wanted or wanted[-1] != self.shape[-1]:
            return self.made().reshape(*shape)
        return self._rows(lambda tensor: tensor.reshape((*wanted[:-1], *tensor.shape[self.ndim - 1 :])))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if end_dim % self.ndim == self.ndim - 1:
            return self.made().flatten(start_dim, end_dim)
        return self._rows(lambda tensor: tensor.flatten(start_dim, end_dim % self.ndim))

    def contiguous(self) -> DeferredLogits:
        return self

    def detach(self) -> DeferredLogits:
        return replace(self._rows(Tensor.detach), head=self.head.detach())

    def float(self) -> DeferredLogits:
        return replace(self, dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            return replace(self, dtype=args[0])
        if len(args) == 1 and not kwargs and torch.device(args[0]) == self.device:
            return self
        return self.made().to(*args, **kwargs)

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, Real):
            return self.made() * factor
        if self.cap is None:
            return replace(self, scale=self.scale * float(factor), known={})
        return replace(self, cap=self.cap * float(factor), known={})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        return self * (1.0 / float(divisor)) if isinstance(divisor, Real) else self.made() / divisor

    def mul_(self, factor: Any) -> DeferredLogits:
        """In place, by a number."""
        changed = self * factor
        if not isinstance(changed, DeferredLogits):
            raise TypeError(f"deferred logits can be scaled in place by a number: got {type(factor).__name__}")
        self.scale, self.cap, self.known = changed.scale, changed.cap, {}
        return self

    def div_(self, divisor: Any) -> DeferredLogits:
        """In place, by a number."""
        return self.mul_(1.0 / divisor)

    def tanh(self) -> Any:
        return replace(self, cap=1.0, known={}) if self.cap is None else self.made().tanh()

    # what they are asked for

    def statistics(self, labels: Tensor) -> Mapping[str, Tensor]:
        """Log-prob of the labels, entropy and mean logit of each row, in the shape of labels, differentiable."""
        self.head.count()
        lead = self.hidden.reshape(-1, self.hidden.shape[-1])
        shape: dict[str, Any] = {"logit_scale": self.scale}
        if self.cap is not None:
            shape = {"softcap": self.cap, "logit_scale": self.scale * self.cap}
        with self.head.precision():
            found = linear_token_stats(
                lead,
                self.head.weight,
                labels.reshape(-1).contiguous(),
                bias=self.head.bias,
                outputs=OUTPUTS,
                **shape,
                **self.head.options,
            )
        # a copy: trainers write into log-probs
        stats = {name: value.reshape(labels.shape).clone() for name, value in found.present().items()}
        self.known.update(stats)
        return stats

    def logp(self, labels: Tensor) -> Tensor:
        return self.statistics(labels)["logp"]

    def entropy(self) -> Tensor:
        """Of each row, (...), differentiable where the logits are."""
        if "entropy" not in self.known:
            self.statistics(torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device))
        return self.known["entropy"]

    def mean(self, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Over the classes, or over everything; logged by trainers, so that a gradient through it is refused."""
        if args or kwargs or dim not in (None, -1, self.ndim - 1):
            return self.made().mean(dim, *args, **kwargs)
        found = self._row_means()
        return found.mean() if dim is None else found

    def nansum(self, *args: Any, **kwargs: Any) -> Any:
        """Over everything; logged by trainers, so that a gradient through it is refused."""
        found = self._row_means().sum() * self.shape[-1]
        if args or kwargs or not found.isfinite():
            return self.made().nansum(*args, **kwargs)
        return found

    def _row_means(self) -> Tensor:
        """The mean logit of each row, (...), in float32 or float64."""
        weight, dtype = self.head.weight.detach(), torch.promote_types(self.hidden.dtype, torch.float32)
        if "mean_logit" in self.known:
            found = self.known["mean_logit"].detach()
        elif self.cap is not None:
            found = self._by_rows(lambda logits: logits.to(dtype).mean(-1))
        else:
            # the mean of h W^T is h times the mean of W: no GEMM
            mean = self.scale * weight.mean(0, dtype=dtype)
            rows = self.hidden.detach().reshape(-1, weight.shape[1])
            found = torch.cat([part.to(dtype) @ mean for part in rows.split(max(1, ROW_ELEMENTS // weight.shape[1]))])
            found = found.reshape(self.shape[:-1])
            if self.head.bias is not None:
                found = found + self.scale * self.head.bias.detach().mean(dtype=dtype)
        return _Logged.apply(found, self.hidden) if self.requires_grad and torch.is_grad_enabled() else found

    def argmax(self, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or dim not in (-1, self.ndim - 1):
            return self.made().argmax(dim, *args, **kwargs)
        return self._by_rows(lambda logits: logits.argmax(-1))

    def log_softmax(self, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or dim not in (-1, self.ndim - 1):
            return self.made().log_softmax(dim, *args, **kwargs)
        return _LogProbs(self)

    def cross_entropy(
        self, target: Tensor, weight: Any = None, ignore_index: int = IGNORE, reduction: str = "mean", **others: Any
    ) -> Any:
        """``F.cross_entropy`` of (N, V) with classes (N,)."""
        plain = weight is None and not any(value for value in others.values()) and reduction in ("mean", "sum")
        if not plain or self.ndim != 2 or target.shape != self.shape[:1]:
            options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
            return F.cross_entropy(self.made(), target, **options, **others)
        total = -self.logp(target.masked_fill(target == ignore_index, IGNORE)).sum()
        return total if reduction == "sum" else total / (target != ignore_index).sum()

    def made(self) -> Tensor:
        """The logits themselves, (..., V)."""
        return self._logits(self.hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        with self.head.precision():
            found = F.linear(hidden, self.head.weight, self.head.bias)
        found = found if self.scale == 1.0 else found * self.scale
        found = found if self.cap is None else torch.tanh(found) * self.cap
        return found if self.dtype is None else found.to(self.dtype)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> DeferredLogits:
        return replace(
            self, hidden=change(self.hidden), known={name: change(value) for name, value in self.known.items()}
        )

    def _by_rows(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        step = max(1, ROW_ELEMENTS // self.shape[-1])
        with torch.no_grad():
            rows = self.hidden.reshape(-1, self.hidden.shape[-1])
            parts = [function(self._logits(part)) for part in rows.split(step)]
            return torch.cat(parts).reshape(self.shape[:-1])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            # it would change logits that are made for the moment
            raise TypeError(f"deferred logits can't be changed in place by {name}: disable() the fused path")
        return getattr(self.made(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        method = _METHODS.get(function)
        if method is not None and args and isinstance(args[0], DeferredLogits):
            kwargs.pop("_stacklevel", None)
            kwargs = {name: value for name, value in kwargs.items() if name not in _LEGACY or value is not None}
            return getattr(args[0], method)(*args[1:], **kwargs)
        args, kwargs = pytree.tree_map(made, (args, kwargs))
        return function(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _LogProbs:
    """``log_softmax`` of deferred logits."""

    logits: DeferredLogits

    def gather(self, dim: int, index: Tensor) -> Tensor:
        lead = self.logits.shape[:-1]
        if dim % self.logits.ndim != self.logits.ndim - 1 or index.shape != (*lead, 1):
            return self.made().gather(dim, index)
        return self.logits.logp(index.squeeze(-1)).unsqueeze(-1)

    def made(self) -> Tensor:
        return self.logits.made().log_softmax(-1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.made(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.gather:
            return args[0].gather(*args[1:], **kwargs)
        if function is torch.take_along_dim:
            names = ("input", "indices", "dim")
            given = dict(zip(names, args, strict=False)) | kwargs
            if given.get("dim") is not None:
                return given["input"].gather(given["dim"], given["indices"])
        args, kwargs = pytree.tree_map(made, (args, kwargs))
        return function(*args, **kwargs)


class _Logged(torch.autograd.Function):
    """A number for the log, whose gradient nobody should ask for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, hidden: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("the mean of deferred logits is for the log and has no gradient")


# older names of reduction, which torch passes on as None
_LEGACY = ("size_average", "reduce", "dtype")
_METHODS = {
    **{getattr(torch, name): name for name in ("tanh", "argmax", "mean", "flatten", "chunk", "split", "log_softmax")},
    F.log_softmax: "log_softmax",
    F.cross_entropy: "cross_entropy",
}


def made(value: Any) -> Any:
    """Logits that are there; what else is given."""
    return value.made() if isinstance(value, (DeferredLogits, _LogProbs)) else value


def _dimensions(item: Any) -> int:
    """How many dimensions an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _operator(name: str) -> Callable[..., Any]:
    def call(self: Any, *others: Any) -> Any:
        return getattr(torch.Tensor, name)(self.made(), *(made(other) for other in others))

    return call


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__neg__", "__pow__", "__rtruediv__"):
    for _class in (DeferredLogits, _LogProbs):
        setattr(_class, _name, _operator(_name))
for _name in ("__mul__", "__rmul__", "__truediv__", "__getitem__"):
    setattr(_LogProbs, _name, _operator(_name))


del _name, _class
