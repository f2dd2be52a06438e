"""Logits that are not there yet: what a model's output layer returns while somebody works out log-probs.

It remembers hidden states and head, follows slices, casts, scales and soft caps, and answers log-probs, entropies and
means from ``linear_token_stats``. Whatever else is asked of it makes the logits, once and with a warning that names the
operation, so that nothing can come out wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from numbers import Real
from operator import methodcaller
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_po.ops import linear_token_stats, token_stats
from fused_po.ops.checks import IGNORE
from fused_po.trainers.head import Call, Head

__all__ = ["DeferredLogits", "made"]

OUTPUTS = ("logp", "entropy", "mean_logit")
# elements of logits at a time where they are looked at row by row
ROW_ELEMENTS = 1 << 22
# what a tensor on the meta device can tell of the shape
SHAPED = (
    *("size", "dim", "ndim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "stride"),
    *("layout", "is_contiguous", "is_sparse", "is_nested", "nbytes", "itemsize"),
)
# older names of reduction, which torch passes on as None
LEGACY = ("size_average", "reduce", "dtype")
# what Python looks up in the class
OPERATORS = (
    *("add", "radd", "sub", "rsub", "rtruediv", "floordiv", "mod", "matmul", "neg", "abs", "pow", "rpow", "eq", "ne"),
    *("lt", "le", "gt", "ge", "iadd", "isub", "ipow", "setitem"),
)


def followed(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the logits: what it returns, or, where that is ``NotImplemented``, what real logits return."""

    @wraps(method)
    def call(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        known = self.now is None and (not self.normal or method.__name__ in ("gather", "take_along_dim"))
        found = method(self, *args, **kwargs) if known else NotImplemented
        return self.ask(method.__name__, *args, **kwargs) if found is NotImplemented else found

    return call


@dataclass(eq=False)
class DeferredLogits:
    """Logits of hidden states under a head, or their ``log_softmax``.

    Attributes:
        hidden: (..., H).
        head: what they are made with, what was done to them included.
        call: where they come from.
        dtype: of the logits, once they are made.
        normal: whether these are log-probs of all classes.
        known: statistics of each row that have been worked out, (...).
        real: the logits, once they had to be made.
        source: the logits that these are a view of, and how to take it.
    """

    hidden: Tensor
    head: Head
    call: Call
    dtype: torch.dtype
    normal: bool = False
    known: dict[str, Tensor] = field(default_factory=dict)
    real: Tensor | None = None
    source: tuple[DeferredLogits, Callable[[Any], Any]] | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.classes))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad or self.head.weight.requires_grad

    @property
    def now(self) -> Tensor | None:
        """The logits, where they or those that they are a view of had to be made."""
        if self.real is None and self.source is not None and self.source[0].now is not None:
            self.real = self.source[1](self.source[0].now)
        return self.real

    def __len__(self) -> int:
        return self.shape[0]

    @followed
    def __getitem__(self, index: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        taken, dims = sum(_dimensions(item) for item in items), self.hidden.ndim
        if any(item is Ellipsis for item in items):
            place = next(i for i, item in enumerate(items) if item is Ellipsis)
            items = (*items[:place], *[slice(None)] * (dims - taken), *items[place + 1 :])
            taken = dims
        cut = slice(None)
        if taken == dims:
            items, cut = items[:-1], items[-1]
        start, stop, step = cut.indices(self.head.classes) if isinstance(cut, slice) else (1, 0, 1)
        if (start, step) != (0, 1):
            return NotImplemented
        rows = self._rows(lambda tensor: tensor[items], lambda logits: logits[index])
        return rows if stop == self.head.classes else rows._as(vocab_size=stop)

    @followed
    def chunk(self, chunks: int, dim: int = 0) -> Any:
        return self._parts(methodcaller("chunk", chunks, dim), dim)

    @followed
    def split(self, split_size: Any, dim: int = 0) -> Any:
        return self._parts(methodcaller("split", split_size, dim), dim)

    def _parts(self, cut: Callable[[Any], Any], dim: int) -> Any:
        def part(i: int) -> DeferredLogits:
            return self._rows(lambda tensor: cut(tensor)[i])

        last = dim % self.hidden.ndim == self.hidden.ndim - 1
        return NotImplemented if last else tuple(part(i) for i in range(len(cut(self.hidden))))

    @followed
    def reshape(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        lead = self.hidden.ndim - 1
        if not wanted or wanted[-1] != self.shape[-1]:
            return NotImplemented
        return self._rows(lambda tensor: tensor.reshape((*wanted[:-1], *tensor.shape[lead:])))

    view = reshape

    @followed
    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        end = end_dim % self.hidden.ndim
        return NotImplemented if end == self.hidden.ndim - 1 else self._rows(lambda t: t.flatten(start_dim, end))

    @followed
    def contiguous(self) -> Any:
        return self

    @followed
    def detach(self) -> Any:
        bias = None if self.head.bias is None else self.head.bias.detach()
        return replace(self._rows(Tensor.detach), head=self.head.with_tensors(self.head.weight.detach(), bias))

    def float(self) -> Any:
        return self.to(torch.float32)

    @followed
    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and torch.empty(0, device=device).device != self.device:
            return NotImplemented
        return self if dtype in (None, self.dtype) else replace(self, dtype=dtype, source=None)

    @followed
    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, Real):
            return NotImplemented
        return replace(self, head=self.head.multiplied(float(factor)), known={}, source=None)

    __rmul__ = mul = __mul__

    @followed
    def __truediv__(self, divisor: Any) -> Any:
        return self * (1.0 / float(divisor)) if isinstance(divisor, Real) else NotImplemented

    div = __truediv__

    @followed
    def mul_(self, factor: Any) -> Any:
        if not isinstance(factor, Real):
            return NotImplemented
        self.head, self.known, self.source = self.head.multiplied(float(factor)), {}, None
        return self

    @followed
    def div_(self, divisor: Any) -> Any:
        return self.mul_(1.0 / float(divisor)) if isinstance(divisor, Real) else NotImplemented

    __imul__, __itruediv__ = mul_, div_

    @followed
    def tanh(self) -> Any:
        return self._as(softcap=1.0) if self.head.softcap is None else NotImplemented

    def statistics(self, labels: Tensor) -> Mapping[str, Tensor]:
        """Log-prob of the labels, entropy and mean logit of each row, in the shape of labels, differentiable."""
        self.call.count()
        targets = labels.reshape(-1).contiguous()
        if self.now is not None:
            found = token_stats(self.now.reshape(-1, self.now.shape[-1]), targets, outputs=OUTPUTS)
        else:
            head, rows = self.whole(), self.hidden.reshape(-1, self.hidden.shape[-1])
            options = {**head.options, **self.call.options}
            with self.call.precision(self.device):
                found = linear_token_stats(rows, head.weight, targets, outputs=OUTPUTS, **options)
        # a copy: trainers write into log-probs
        stats = {name: value.reshape(labels.shape).clone() for name, value in found.present().items()}
        self.known.update(stats)
        return stats

    def whole(self) -> Head:
        return self.head.whole(self.call.layer)

    def logp(self, labels: Tensor) -> Tensor:
        return self.statistics(labels)["logp"]

    def entropy(self) -> Tensor:
        """Of each row, (...), differentiable where the logits are."""
        if "entropy" not in self.known:
            self.statistics(torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device))
        return self.known["entropy"]

    @followed
    def mean(self, dim: Any = None) -> Any:
        """Over the classes, or over everything; logged by trainers, so that a gradient through it is refused."""
        if dim not in (None, -1, self.hidden.ndim - 1):
            return NotImplemented
        return self._row_means().mean() if dim is None else self._row_means()

    @followed
    def nansum(self, *dim: Any) -> Any:
        found = self._row_means().sum() * self.shape[-1]
        return NotImplemented if dim or not found.isfinite() else found

    def _row_means(self) -> Tensor:
        """The mean logit of each row, (...), in float32 or float64."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        if "mean_logit" in self.known:
            found = self.known["mean_logit"].detach()
        elif self.head.softcap is not None:
            found = self._by_rows(lambda rows, head: self._logits(rows, head).to(dtype).mean(-1))
        else:
            # the mean of h W^T is h times the mean of W: no GEMM
            def mean(tensor: Tensor) -> Tensor:
                return tensor.detach()[: self.head.classes].mean(0, dtype=dtype)

            found = self._by_rows(lambda rows, head: rows.to(dtype) @ mean(head.weight))
            found = self.head.logit_scale * (found if self.head.bias is None else found + mean(self.head.bias))
        return _Logged.apply(found, self.hidden) if self.requires_grad and torch.is_grad_enabled() else found

    @followed
    def argmax(self, dim: Any = None) -> Any:
        last = dim in (-1, self.hidden.ndim - 1)
        return self._by_rows(lambda rows, head: self._logits(rows, head).argmax(-1)) if last else NotImplemented

    @followed
    def log_softmax(self, dim: Any = None) -> Any:
        if dim not in (-1, self.hidden.ndim - 1):
            return NotImplemented
        return replace(self, normal=True, source=(self, methodcaller("log_softmax", -1)))

    @followed
    def gather(self, dim: int, index: Tensor) -> Any:
        if not self.normal or dim not in (-1, self.hidden.ndim - 1) or index.shape != (*self.shape[:-1], 1):
            return NotImplemented
        return self.logp(index.squeeze(-1)).unsqueeze(-1)

    @followed
    def take_along_dim(self, indices: Tensor, dim: Any = None) -> Any:
        return NotImplemented if dim is None else self.gather(dim, indices)

    def cross_entropy(
        self, target: Tensor, weight: Any = None, ignore_index: int = IGNORE, reduction: str = "mean", **others: Any
    ) -> Any:
        """``F.cross_entropy`` of (N, V) with classes (N,)."""
        plain = weight is None and not any(value for value in others.values()) and reduction in ("mean", "sum")
        if not plain or self.normal or self.hidden.ndim != 2 or target.shape != self.shape[:1]:
            options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
            return F.cross_entropy(self.known_as("cross_entropy"), target, **options, **others)
        total = -self.logp(target.masked_fill(target == ignore_index, IGNORE)).sum()
        return total if reduction == "sum" else total / (target != ignore_index).sum()

    def made(self) -> Tensor:
        """The logits themselves, (..., V)."""
        return self._logits(self.hidden, self.whole()) if self.now is None else self.now

    def known_as(self, name: str, *, written: bool = False) -> Tensor:
        """The logits themselves, from now on, for an operation that is not followed, or that writes into them."""
        if self.normal and self.now is None:
            name = f"log_softmax and {name}"
        if self.now is None:
            if name not in self.call.unknown:
                self.call.unknown.append(name)
                size = " x ".join(map(str, self.shape))
                warnings.warn(f"{name} of a model's logits is not followed: all {size} of them are made", stacklevel=4)
            view = self.source if written or self.normal else None
            # also where a trainer looks at them for its log: the graph may be wanted later
            with torch.set_grad_enabled(self.requires_grad):
                self.real = self.made() if view is None else view[1](view[0].known_as(name, written=True))
        assert self.real is not None
        return self.real

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What a method of real logits returns; these where it changes them in place."""
        written = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        real = self.known_as(name, written=written)
        args, kwargs = made((args, kwargs))
        found = getattr(real, name)(*args, **kwargs)
        return self if found is real else found

    def _logits(self, hidden: Tensor, head: Head) -> Tensor:
        with self.call.precision(self.device):
            found = head.logits(hidden).to(self.dtype)
        return found.log_softmax(-1) if self.normal else found

    def _as(self, **changes: Any) -> DeferredLogits:
        return replace(self, head=replace(self.head, **changes), known={}, source=None)

    def _rows(self, change: Callable[[Any], Any], view: Callable[[Any], Any] | None = None) -> DeferredLogits:
        known = {name: change(value) for name, value in self.known.items()}
        return replace(self, hidden=change(self.hidden), known=known, source=(self, view or change))

    def _by_rows(self, function: Callable[[Tensor, Head], Tensor]) -> Tensor:
        step, head = max(1, ROW_ELEMENTS // self.shape[-1]), self.whole()
        with torch.no_grad():
            rows = self.hidden.reshape(-1, self.hidden.shape[-1])
            return torch.cat([function(part, head) for part in rows.split(step)]).reshape(self.shape[:-1])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        if name in SHAPED:
            return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        if callable(getattr(Tensor, name)):
            return lambda *args, **kwargs: self.ask(name, *args, **kwargs)
        return getattr(self.known_as(name), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", str(function))
        if args and _is_deferred(args[0]) and hasattr(cls, name):
            kwargs.pop("_stacklevel", None)
            kwargs = {key: value for key, value in kwargs.items() if key not in LEGACY or value is not None}
            return getattr(args[0], name)(*args[1:], **kwargs)

        def real(value: Any) -> Any:
            return value.known_as(name) if _is_deferred(value) else value

        args, kwargs = pytree.tree_map(real, (args, kwargs), is_leaf=_is_deferred)
        return function(*args, **kwargs)


class _Logged(torch.autograd.Function):
    """A number for the log, whose gradient nobody should ask for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, hidden: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("the mean of deferred logits is for the log and has no gradient")


def made(value: Any) -> Any:
    """What is given, with logits that are there."""
    return pytree.tree_map(lambda leaf: leaf.made() if _is_deferred(leaf) else leaf, value, is_leaf=_is_deferred)


def _is_deferred(value: Any) -> bool:
    return isinstance(value, DeferredLogits)


def _dimensions(item: Any) -> int:
    """How many dimensions an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _flatten(logits: DeferredLogits) -> tuple[list[Any], Any]:
    return [logits.hidden, logits.head.weight, logits.head.bias, logits.known, logits.real], logits


def _unflatten(parts: Any, logits: DeferredLogits) -> DeferredLogits:
    hidden, weight, bias, known, real = parts
    return replace(logits, hidden=hidden, head=logits.head.with_tensors(weight, bias), known=known, real=real)


for _name in OPERATORS:
    setattr(DeferredLogits, f"__{_name}__", lambda self, *others, _n=f"__{_name}__": self.ask(_n, *others))
DeferredLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
# so that what wraps a model finds the tensors in it
pytree.register_pytree_node(DeferredLogits, _flatten, _unflatten)
