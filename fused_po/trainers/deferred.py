"""What a model's output layer returns while somebody works out log-probs: logits that are not there yet.

They follow slices, casts, scales and soft caps, and answer log-probs, entropies and means from
``linear_token_stats``. Whatever else is asked of them makes the logits (see ``unmade``), so that nothing can come out
wrong.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from fused_po.stats import Stats
from fused_po.trainers.head import ModelHead
from fused_po.trainers.unmade import Unmade

__all__ = ["DeferredLogits", "stats_of"]

OUTPUTS = ("logp", "entropy", "mean_logit")
# of them, what is the same for any label
KEPT = ("entropy", "mean_logit")
# elements of logits at a time where they are looked at row by row
ROW_ELEMENTS = 1 << 22


def stats_of(
    logits: Tensor | DeferredLogits,
    labels: Tensor,
    outputs: Sequence[str],
    *,
    temperature: float | Tensor = 1.0,
    **options: Any,
) -> Stats:
    """Statistics of labels (...) under logits (..., V), there or not, in the precision that the model ran in.

    Args:
        logits, labels: in a shape that ``linear_token_stats`` takes.
        outputs, temperature: as there.
        options: of ``linear_token_stats``, before those of the logits' own call.
    """
    made = logits if isinstance(logits, Tensor) else logits.now
    if isinstance(logits, Tensor) or made is not None:
        assert made is not None
        return token_stats(made, labels, outputs=tuple(outputs), temperature=temperature)
    head = logits.whole()
    given = {**head.options, **logits.call.options, **options}
    with logits.call.precision(logits.device):
        return linear_token_stats(
            logits.hidden, head.weight, labels, outputs=tuple(outputs), temperature=temperature, **given
        )


def followed(method: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """A method of the logits: what it returns, or, where that is ``NotImplemented``, what real logits return.

    Args:
        method: takes those arguments that it can follow.
        name: of the method of real logits; "": the same.
    """
    name, signature = name or method.__name__, inspect.signature(method)

    @wraps(method)
    def call(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        found = NotImplemented
        if self.now is None and (not self.normal or name in ("gather", "take_along_dim")):
            try:
                signature.bind(self, *args, **kwargs)
            except TypeError:
                return self.ask(name, *args, **kwargs)
            found = method(self, *args, **kwargs)
        return self.ask(name, *args, **kwargs) if found is NotImplemented else found

    return call


class DeferredLogits(Unmade):
    """Logits of hidden states under a head, or their ``log_softmax``, see ``Unmade``."""

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
        found = self.rows(lambda tensor: tensor[items], lambda logits: logits[index])
        if stop != self.head.classes:
            found.head, found.known = replace(found.head, vocab_size=stop), {}
        return found

    @followed
    def chunk(self, chunks: int, dim: int = 0) -> Any:
        return self._parts(methodcaller("chunk", chunks, self._dimension(dim)), dim)

    @followed
    def split(self, split_size: Any, dim: int = 0) -> Any:
        return self._parts(methodcaller("split", split_size, self._dimension(dim)), dim)

    def _parts(self, cut: Callable[[Any], Any], dim: int) -> Any:
        def part(i: int) -> DeferredLogits:
            return self.rows(lambda tensor: cut(tensor)[i])

        if self._dimension(dim) not in range(self.hidden.ndim - 1):
            return NotImplemented
        return tuple(part(i) for i in range(len(cut(self.hidden))))

    def _shaped(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        lead = self.hidden.ndim - 1
        if not wanted or wanted[-1] != self.shape[-1]:
            return NotImplemented
        return self.rows(lambda tensor: tensor.reshape((*wanted[:-1], *tensor.shape[lead:])))

    reshape, view = followed(_shaped, "reshape"), followed(_shaped, "view")

    @followed
    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        start, end = self._dimension(start_dim), self._dimension(end_dim)
        rows = range(self.hidden.ndim - 1)
        return self.rows(lambda logits: logits.flatten(start, end)) if start in rows and end in rows else NotImplemented

    @followed
    def contiguous(self) -> Any:
        return self if self.hidden.is_contiguous() else self.rows(Tensor.contiguous)

    @followed
    def detach(self) -> Any:
        found = self.rows(Tensor.detach)
        bias = None if self.head.bias is None else self.head.bias.detach()
        found.head = self.head.with_tensors(self.head.weight.detach(), bias)
        return found

    def float(self) -> Any:
        return self.to(torch.float32)

    @followed
    def to(self, *args: Any, **kwargs: Any) -> Any:
        try:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        except (TypeError, RuntimeError):
            return NotImplemented
        if device is not None and torch.empty(0, device=device).device != self.device:
            return NotImplemented
        return self if dtype in (None, self.dtype) else self.copied(dtype=dtype)

    def _times(self, factor: Any) -> Any:
        if not _is_factor(factor):
            return NotImplemented
        return self.copied(head=self.head.multiplied(float(factor)), known={})

    def _over(self, divisor: Any) -> Any:
        return self._times(1.0 / float(divisor)) if _is_factor(divisor) else NotImplemented

    def _times_in_place(self, factor: Any) -> Any:
        if not _is_factor(factor):
            return NotImplemented
        self.scale_in_place(float(factor))
        return self

    def _over_in_place(self, divisor: Any) -> Any:
        return self._times_in_place(1.0 / float(divisor)) if _is_factor(divisor) else NotImplemented

    __mul__, __rmul__, mul = followed(_times, "__mul__"), followed(_times, "__rmul__"), followed(_times, "mul")
    __truediv__, div = followed(_over, "__truediv__"), followed(_over, "div")
    __imul__, mul_ = followed(_times_in_place, "__imul__"), followed(_times_in_place, "mul_")
    __itruediv__, div_ = followed(_over_in_place, "__itruediv__"), followed(_over_in_place, "div_")

    @followed
    def tanh(self) -> Any:
        head = replace(self.head, softcap=1.0)
        return self.copied(head=head, known={}) if self.head.softcap is None else NotImplemented

    def statistics(self, labels: Tensor) -> Mapping[str, Tensor]:
        """Log-prob of the labels, entropy and mean logit of each row, in the shape of labels, differentiable."""
        self.call.count()
        flat = (-1, self.shape[-1])
        rows = self._shaped(*flat) if self.now is None else self.now.reshape(flat)
        found = stats_of(rows, labels.reshape(-1).contiguous(), OUTPUTS).present()
        stats = {name: value.reshape(labels.shape) for name, value in found.items()}
        if self.now is None:
            kept = {name: stats[name] for name in KEPT} | {"ignored": labels == IGNORE}
            self.known.update({name: value.reshape(self.shape[:-1]) for name, value in kept.items()})
        # a copy: trainers write into log-probs
        return {name: value.clone() for name, value in stats.items()}

    def logp(self, labels: Tensor) -> Tensor:
        return self.statistics(labels)["logp"]

    def entropy(self) -> Tensor:
        """Of each row, (...), differentiable where the logits are."""
        found = self._of_every_row("entropy")
        if found is None or (self.requires_grad and torch.is_grad_enabled() and not found.requires_grad):
            return self.statistics(torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device))["entropy"]
        return found.clone()

    def _of_every_row(self, name: str) -> Tensor | None:
        """What is known of each row; None: nothing, or not of those that were ignored."""
        known = self.now is None and name in self.known and not self.known["ignored"].any()
        return self.known[name] if known else None

    @followed
    def mean(self, dim: Any = None) -> Any:
        """Over the classes, or over everything; logged by trainers, so that a gradient through it is refused."""
        if dim is not None and not self._last(dim):
            return NotImplemented
        return self._row_means().mean() if dim is None else self._row_means()

    @followed
    def nansum(self) -> Any:
        found = self._row_means().sum() * self.shape[-1]
        return found if found.isfinite() else NotImplemented

    def _row_means(self) -> Tensor:
        """The mean logit of each row, (...), in float32 or float64."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        known = self._of_every_row("mean_logit")
        if known is not None:
            found = known.detach()
        elif self.head.softcap is not None:
            found = self._by_rows(lambda rows, head: self.logits_of(rows, head).to(dtype).mean(-1))
        else:
            # the mean of h W^T is h times the mean of W: no GEMM
            def mean(tensor: Tensor) -> Tensor:
                return tensor.detach()[: self.head.classes].mean(0, dtype=dtype)

            found = self._by_rows(lambda rows, head: rows.to(dtype) @ mean(head.weight))
            found = self.head.logit_scale * (found if self.head.bias is None else found + mean(self.head.bias))
        return _Logged.apply(found, self.hidden) if self.requires_grad and torch.is_grad_enabled() else found

    def _by_rows(self, function: Callable[[Tensor, ModelHead], Tensor]) -> Tensor:
        step, head = max(1, ROW_ELEMENTS // self.shape[-1]), self.whole()
        with torch.no_grad():
            rows = self.hidden.reshape(-1, self.hidden.shape[-1])
            return torch.cat([function(part, head) for part in rows.split(step)]).reshape(self.shape[:-1])

    @followed
    def argmax(self, dim: Any = None) -> Any:
        if not self._last(dim):
            return NotImplemented
        return self._by_rows(lambda rows, head: self.logits_of(rows, head).argmax(-1))

    @followed
    def log_softmax(self, dim: Any = None, dtype: Any = None) -> Any:
        # the dtype of statistics, if not their own
        if not self._last(dim) or dtype not in (None, torch.float32):
            return NotImplemented
        # what becomes known of them is known of these
        return self.copied(normal=True, dtype=dtype or self.dtype)

    @followed
    def gather(self, dim: int, index: Tensor) -> Any:
        if not self.normal or not self._last(dim) or index.shape != (*self.shape[:-1], 1):
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

    def _dimension(self, dim: int) -> int:
        """Counted from the front, so that it is the same of what has no classes."""
        return dim + self.hidden.ndim if dim < 0 else dim

    def _last(self, dim: Any) -> bool:
        """Whether a dimension is that of the classes."""
        return dim in (-1, self.hidden.ndim - 1)


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


def _is_factor(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and value != 0


def _flatten(logits: DeferredLogits) -> tuple[list[Any], Any]:
    return [logits.hidden, logits.head.weight, logits.head.bias, logits.known, logits.now], logits


def _unflatten(parts: Any, logits: DeferredLogits) -> DeferredLogits:
    hidden, weight, bias, known, held = parts
    return logits.copied(hidden=hidden, head=logits.head.with_tensors(weight, bias), known=known, held=held)


# so that what wraps a model finds the tensors in it
pytree.register_pytree_node(DeferredLogits, _flatten, _unflatten)
