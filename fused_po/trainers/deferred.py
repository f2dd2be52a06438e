"""Logits that are not there yet: what a model's output layer returns while somebody works out log-probs.

``DeferredLogits`` stands for the logits: it remembers hidden states and head, follows slices, casts, scales and soft
caps, and answers log-probs, entropies and means from ``linear_token_stats``. Whatever else is asked of it makes the
logits, once and with a warning that names the operation, so that nothing can come out wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real
from operator import methodcaller
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_po.ops import linear_token_stats, token_stats
from fused_po.ops.checks import IGNORE
from fused_po.trainers.head import Head
from fused_po.trainers.sharded import whole
from fused_po.trainers.unmade import Unmade, followed, made

__all__ = ["Call", "DeferredLogits", "made"]

OUTPUTS = ("logp", "entropy", "mean_logit")
# elements of logits at a time where they are looked at row by row
ROW_ELEMENTS = 1 << 22
# what a tensor on the meta device can tell of the shape
SHAPED = {"size", "dim", "ndim", "ndimension", "numel", "nelement", "element_size", "itemsize", "nbytes", "layout"} | {
    *("stride", "is_contiguous", "is_floating_point", "is_complex", "is_sparse", "is_nested", "is_quantized"),
}


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
    options: Mapping[str, Any] = field(default_factory=dict)
    count: Callable[[], None] = lambda: None
    autocast: torch.dtype | None = None
    unknown: list[str] = field(default_factory=list)

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)

    def warn(self, name: str, shape: torch.Size) -> None:
        if name not in self.unknown:
            self.unknown.append(name)
            size = " x ".join(map(str, shape))
            warnings.warn(f"{name} of a model's logits is not followed: all {size} of them are made", stacklevel=4)


@dataclass(eq=False)
class DeferredLogits(Unmade):
    """Logits of hidden states under a head.

    Attributes:
        hidden: (..., H).
        head: what they are made with, what was done to them included.
        call: where they come from.
        dtype: of the logits, once they are made.
        known: statistics of each row that have been worked out, (...).
        real: the logits, once they had to be made.
        source: the logits that these are a view of, and how to take it.
    """

    FUNCTIONS = frozenset(
        "tanh argmax mean flatten chunk split log_softmax cross_entropy reshape unsqueeze mul div detach clone".split()
    )
    hidden: Tensor
    head: Head
    call: Call
    dtype: torch.dtype
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

    # what logits are made of, followed

    @followed
    def __getitem__(self, index: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        taken, dims = sum(_dimensions(item) for item in items), self.hidden.ndim
        if any(item is Ellipsis for item in items):
            place = next(i for i, item in enumerate(items) if item is Ellipsis)
            items = (*items[:place], *[slice(None)] * (dims - taken), *items[place + 1 :])
            taken = dims
        head = self.head
        if taken == dims:
            classes = items[-1].indices(head.classes) if isinstance(items[-1], slice) else (1, 0, 1)
            if classes[0] != 0 or classes[2] != 1:
                return NotImplemented
            if classes[1] != head.classes:
                head = replace(head, vocab_size=classes[1])
            items = items[:-1]
        rows = self._rows(lambda tensor: tensor[items], lambda logits: logits[index])
        return rows if head is self.head else replace(rows, head=head, known={})

    @followed
    def chunk(self, chunks: int, dim: int = 0) -> Any:
        return self._parts(methodcaller("chunk", chunks, dim), dim)

    @followed
    def split(self, split_size: Any, dim: int = 0) -> Any:
        return self._parts(methodcaller("split", split_size, dim), dim)

    def _parts(self, cut: Callable[[Any], Any], dim: int) -> Any:
        if dim % self.hidden.ndim == self.hidden.ndim - 1:
            return NotImplemented
        return tuple(
            self._rows(lambda tensor, i=i: cut(tensor)[i]) for i in range(len(cut(self.hidden)))  # type: ignore[misc]
        )

    @followed
    def reshape(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        if not wanted or wanted[-1] != self.shape[-1]:
            return NotImplemented
        lead = self.hidden.ndim - 1
        return self._rows(lambda tensor: tensor.reshape((*wanted[:-1], *tensor.shape[lead:])))

    view = reshape

    @followed
    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        end = end_dim % self.hidden.ndim
        return NotImplemented if end == self.hidden.ndim - 1 else self._rows(lambda t: t.flatten(start_dim, end))

    @followed
    def unsqueeze(self, dim: int) -> Any:
        place = dim % (self.hidden.ndim + 1)
        return NotImplemented if place == self.hidden.ndim else self._rows(lambda tensor: tensor.unsqueeze(place))

    @followed
    def contiguous(self) -> Any:
        return self

    @followed
    def clone(self) -> Any:
        return replace(self, source=None)

    @followed
    def detach(self) -> Any:
        bias = None if self.head.bias is None else self.head.bias.detach()
        return replace(self._rows(Tensor.detach), head=replace(self.head, weight=self.head.weight.detach(), bias=bias))

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
        scale, cap = self.head.logit_scale * float(factor), self.head.softcap
        cap = None if cap is None else cap * float(factor)
        return replace(self, head=replace(self.head, logit_scale=scale, softcap=cap), known={}, source=None)

    __rmul__ = mul = __mul__

    @followed
    def __truediv__(self, divisor: Any) -> Any:
        return self * (1.0 / float(divisor)) if isinstance(divisor, Real) else NotImplemented

    div = __truediv__

    @followed
    def mul_(self, factor: Any) -> Any:
        if not isinstance(factor, Real):
            return NotImplemented
        self.head, self.known, self.source = (self * factor).head, {}, None
        return self

    @followed
    def div_(self, divisor: Any) -> Any:
        return self.mul_(1.0 / float(divisor)) if isinstance(divisor, Real) else NotImplemented

    __imul__, __itruediv__ = mul_, div_

    @followed
    def tanh(self) -> Any:
        if self.head.softcap is not None:
            return NotImplemented
        return replace(self, head=replace(self.head, softcap=1.0), known={}, source=None)

    # what they are asked for

    def statistics(self, labels: Tensor) -> Mapping[str, Tensor]:
        """Log-prob of the labels, entropy and mean logit of each row, in the shape of labels, differentiable."""
        self.call.count()
        targets, options = labels.reshape(-1).contiguous(), {"outputs": OUTPUTS, **self.call.options}
        if self.now is not None:
            backend = {name: value for name, value in options.items() if name in ("outputs", "backend")}
            found = token_stats(self.now.reshape(-1, self.now.shape[-1]), targets, **backend)
        else:
            head, rows = self.whole(), self.hidden.reshape(-1, self.hidden.shape[-1])
            with self.call.precision(self.device):
                found = linear_token_stats(rows, head.weight, targets, **head.options, **options)
        # a copy: trainers write into log-probs
        stats = {name: value.reshape(labels.shape).clone() for name, value in found.present().items()}
        self.known.update(stats)
        return stats

    def whole(self) -> Head:
        """The head, gathered from the ranks where it is sharded again since the model ran."""
        return whole(self.head, self.call.layer)

    def logp(self, labels: Tensor) -> Tensor:
        return self.statistics(labels)["logp"]

    def entropy(self) -> Tensor:
        """Of each row, (...), differentiable where the logits are."""
        if "entropy" not in self.known:
            self.statistics(torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device))
        return self.known["entropy"]

    @followed
    def mean(self, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Over the classes, or over everything; logged by trainers, so that a gradient through it is refused."""
        if args or kwargs or dim not in (None, -1, self.hidden.ndim - 1):
            return NotImplemented
        found = self._row_means()
        return found.mean() if dim is None else found

    @followed
    def nansum(self, *args: Any, **kwargs: Any) -> Any:
        """Over everything; logged by trainers, so that a gradient through it is refused."""
        found = self._row_means().sum() * self.shape[-1]
        return NotImplemented if args or kwargs or not found.isfinite() else found

    def _row_means(self) -> Tensor:
        """The mean logit of each row, (...), in float32 or float64."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        if "mean_logit" in self.known:
            found = self.known["mean_logit"].detach()
        elif self.head.softcap is not None:
            found = self._by_rows(lambda logits: logits.to(dtype).mean(-1))
        else:
            # the mean of h W^T is h times the mean of W: no GEMM
            head, classes = self.whole(), self.head.classes
            mean = head.logit_scale * head.weight.detach()[:classes].mean(0, dtype=dtype)
            rows = self.hidden.detach().reshape(-1, len(mean))
            found = torch.cat([part.to(dtype) @ mean for part in rows.split(max(1, ROW_ELEMENTS // len(mean)))])
            found = found.reshape(self.shape[:-1])
            if head.bias is not None:
                found = found + head.logit_scale * head.bias.detach()[:classes].mean(dtype=dtype)
        return _Logged.apply(found, self.hidden) if self.requires_grad and torch.is_grad_enabled() else found

    @followed
    def argmax(self, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        last = not (args or kwargs) and dim in (-1, self.hidden.ndim - 1)
        return self._by_rows(lambda logits: logits.argmax(-1)) if last else NotImplemented

    @followed
    def log_softmax(self, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        last = not (args or kwargs) and dim in (-1, self.hidden.ndim - 1)
        return _LogProbs(self) if last else NotImplemented

    def cross_entropy(
        self, target: Tensor, weight: Any = None, ignore_index: int = IGNORE, reduction: str = "mean", **others: Any
    ) -> Any:
        """``F.cross_entropy`` of (N, V) with classes (N,)."""
        plain = weight is None and not any(value for value in others.values()) and reduction in ("mean", "sum")
        if not plain or self.hidden.ndim != 2 or target.shape != self.shape[:1]:
            options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
            return F.cross_entropy(self.known_as("cross_entropy"), target, **options, **others)
        total = -self.logp(target.masked_fill(target == ignore_index, IGNORE)).sum()
        return total if reduction == "sum" else total / (target != ignore_index).sum()

    def made(self) -> Tensor:
        """The logits themselves, (..., V)."""
        return self._logits(self.hidden, self.whole()) if self.now is None else self.now

    def known_as(self, name: str, *, written: bool = False) -> Tensor:
        """The logits themselves, from now on, for an operation that is not followed."""
        if self.now is None:
            self.call.warn(name, self.shape)
            # also where a trainer looks at them for its log: the graph may be wanted later
            with torch.set_grad_enabled(self.requires_grad):
                view = self.source if written else None
                self.real = self.made() if view is None else view[1](view[0].known_as(name, written=True))
        assert self.real is not None
        return self.real

    def _logits(self, hidden: Tensor, head: Head) -> Tensor:
        with self.call.precision(self.device):
            return head.logits(hidden).to(self.dtype)

    def _rows(self, change: Callable[[Any], Any], view: Callable[[Any], Any] | None = None) -> DeferredLogits:
        known = {name: change(value) for name, value in self.known.items()}
        return replace(self, hidden=change(self.hidden), known=known, source=(self, view or change))

    def _by_rows(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        step, head = max(1, ROW_ELEMENTS // self.shape[-1]), self.whole()
        with torch.no_grad():
            rows = self.hidden.reshape(-1, self.hidden.shape[-1])
            parts = [function(self._logits(part, head)) for part in rows.split(step)]
            return torch.cat(parts).reshape(self.shape[:-1])

    def __getattr__(self, name: str) -> Any:
        if name in SHAPED:
            return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        return super().__getattr__(name)


@dataclass(frozen=True, eq=False)
class _LogProbs(Unmade):
    """``log_softmax`` of deferred logits."""

    FUNCTIONS = frozenset({"gather", "take_along_dim"})
    logits: DeferredLogits

    def gather(self, dim: int, index: Tensor) -> Tensor:
        lead = self.logits.shape[:-1]
        if dim % (len(lead) + 1) != len(lead) or index.shape != (*lead, 1):
            return self.known_as("gather").gather(dim, index)
        return self.logits.logp(index.squeeze(-1)).unsqueeze(-1)

    def take_along_dim(self, indices: Tensor, dim: Any = None) -> Tensor:
        return self.ask("take_along_dim", (indices,)) if dim is None else self.gather(dim, indices)

    def made(self) -> Tensor:
        return self.logits.made().log_softmax(-1)

    def known_as(self, name: str, *, written: bool = False) -> Tensor:
        return self.logits.known_as(f"log_softmax and {name}").log_softmax(-1)


class _Logged(torch.autograd.Function):
    """A number for the log, whose gradient nobody should ask for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, hidden: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("the mean of deferred logits is for the log and has no gradient")


def _dimensions(item: Any) -> int:
    """How many dimensions an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _flatten(logits: DeferredLogits) -> tuple[list[Any], Any]:
    parts = [logits.hidden, logits.head.weight, logits.head.bias, logits.known]
    return [*parts, logits.real], logits


def _unflatten(parts: Any, logits: DeferredLogits) -> DeferredLogits:
    hidden, weight, bias, known, real = parts
    return replace(logits, hidden=hidden, head=replace(logits.head, weight=weight, bias=bias), known=known, real=real)


# so that what wraps a model finds the tensors in it
pytree.register_pytree_node(DeferredLogits, _flatten, _unflatten)
