"""Logits that are not there yet: made when PyTorch asks for them, once, with a warning that names the operation.

What can be done without making them: see ``deferred``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_po.trainers.head import Call, ModelHead

__all__ = ["Unmade", "made"]

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

Some = TypeVar("Some", bound="Unmade")


def _same(logits: Any) -> Any:
    return logits


@dataclass(eq=False)
class Unmade:
    """Logits of hidden states under a head, or their ``log_softmax``.

    Attributes:
        hidden: (..., H).
        head: what they are made with, what was done to them included.
        call: where they come from.
        dtype: of the logits, once they are made.
        normal: whether these are log-probs of all classes.
        known: statistics of each row that have been worked out, (...), and which rows they leave out as ignored.
        held: the logits, once they had to be made.
        shared: what they share with logits that they are a view of, or that are views of them; None: there are none.
        taken: takes these from the first of those.
        seen: how many of the writes there these heed.
    """

    hidden: Tensor
    head: ModelHead
    call: Call
    dtype: torch.dtype
    normal: bool = False
    known: dict[str, Tensor] = field(default_factory=dict)
    held: Tensor | None = None
    shared: Shared | None = None
    taken: Callable[[Any], Any] = _same
    seen: int = 0

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
        """The logits, where they or those that they share memory with had to be made, or were written into."""
        shared = self.shared
        if shared is not None and (shared.held is not None or self.seen < len(shared.writes)):
            found: Tensor = self.taken(shared.made("an operation in place on a part"))
            return found
        return self.held

    def __len__(self) -> int:
        return self.shape[0]

    def whole(self) -> ModelHead:
        return self.head.whole(self.call.layer)

    def made(self) -> Tensor:
        """The logits themselves, (..., V)."""
        now = self.now
        return self.logits_of(self.hidden, self.whole()) if now is None else now

    def logits_of(self, hidden: Tensor, head: ModelHead) -> Tensor:
        with self.call.precision(self.device):
            found = head.logits(hidden).to(self.dtype)
        return found.log_softmax(-1) if self.normal else found

    def known_as(self, name: str, *, written: bool = False) -> Tensor:
        """The logits themselves, from now on, for an operation that is not followed, or that writes into them."""
        if self.normal and self.now is None:
            name = f"log_softmax and {name}"
        if written and self.shared is not None:
            self.shared.made(name)
        elif self.now is None:
            if name not in self.call.unknown:
                self.call.unknown.append(name)
                size = " x ".join(map(str, self.shape))
                warnings.warn(f"{name} of a model's logits is not followed: all {size} of them are made", stacklevel=4)
            # also where a trainer looks at them for its log: the graph may be wanted later
            with torch.set_grad_enabled(self.requires_grad):
                self.held = self.made()
        now = self.now
        assert now is not None
        return now

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What a method of real logits returns; these where it changes them in place."""
        written = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        real = self.known_as(name, written=written)
        args, kwargs = made((args, kwargs))
        found = getattr(real, name)(*args, **kwargs)
        return self if found is real else found

    def copied(self: Some, **changes: Any) -> Some:
        """Logits of their own, with changes."""
        return replace(self, shared=None, taken=_same, seen=0, **changes)

    def rows(self: Some, change: Callable[[Any], Any], view: Callable[[Any], Any] | None = None) -> Some:
        """Some rows, or another shape of them: a view where PyTorch takes one.

        Args:
            change: of what has their leading dimensions.
            view: the same of logits; None: it is the same.
        """
        hidden = change(self.hidden)
        if self.shared is None and not _share(hidden, self.hidden):
            # logits that were just made have no gaps
            self.hidden = self.hidden.contiguous()
            hidden = change(self.hidden)
        known = {name: change(value) for name, value in self.known.items()}
        if not _share(hidden, self.hidden):
            return self.copied(hidden=hidden, known=known)
        if self.shared is None:
            self.shared = Shared(self.copied())
        before, after = self.taken, view or change
        return replace(self, hidden=hidden, known=known, taken=lambda logits: after(before(logits)))

    def scale_in_place(self, factor: float) -> None:
        """Times a number."""
        if self.shared is not None:
            self.shared.writes.append((self.taken, factor))
            self.seen = len(self.shared.writes)
        self.head, self.known = self.head.multiplied(factor), {}

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
        if args and _is_unmade(args[0]) and callable(getattr(cls, name, None)):
            kwargs.pop("_stacklevel", None)
            kwargs = {key: value for key, value in kwargs.items() if key not in LEGACY or value is not None}
            return getattr(args[0], name)(*args[1:], **kwargs)

        def real(value: Any) -> Any:
            return value.known_as(name) if _is_unmade(value) else value

        args, kwargs = pytree.tree_map(real, (args, kwargs), is_leaf=_is_unmade)
        return function(*args, **kwargs)


class Shared:
    """What logits and their views share: what was written into them, and their memory once there is some.

    Args:
        first: the logits as they were before anything was written, without relatives.
    """

    def __init__(self, first: Unmade) -> None:
        self.first = first
        self.held: Tensor | None = None
        # how the part is taken that was multiplied, and by what
        self.writes: list[tuple[Callable[[Any], Any], float]] = []

    def made(self, name: str) -> Tensor:
        """All of them, with what was written, for an operation of that name."""
        if self.held is None:
            self.held = self.first.known_as(name)
            with torch.set_grad_enabled(self.first.requires_grad):
                for taken, factor in self.writes:
                    taken(self.held).mul_(factor)
        return self.held


def made(value: Any) -> Any:
    """What is given, with logits that are there."""
    return pytree.tree_map(lambda leaf: leaf.made() if _is_unmade(leaf) else leaf, value, is_leaf=_is_unmade)


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _is_unmade(value: Any) -> bool:
    return isinstance(value, Unmade)


for _name in OPERATORS:
    setattr(Unmade, f"__{_name}__", lambda self, *others, _n=f"__{_name}__": self.ask(_n, *others))
Unmade.__hash__ = object.__hash__  # type: ignore[method-assign]
