"""Tensors that are not there yet: they are made once something is asked of them that nobody has taught them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Unmade", "followed", "is_unmade", "made"]

# older names of reduction, which torch passes on as None
LEGACY = ("size_average", "reduce", "dtype")
OPERATORS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv mod matmul neg abs pow rpow eq ne lt le gt ge
    iadd isub imul itruediv ipow getitem setitem
""".split()


class Unmade:
    """What is made once something is asked of it that its class has no method for.

    Attributes:
        FUNCTIONS: torch's functions that are methods of the class, by name.
    """

    FUNCTIONS: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        for name in (f"__{one}__" for one in OPERATORS):
            if name not in vars(cls):
                setattr(cls, name, _operator(name))
        cls.__hash__ = object.__hash__  # type: ignore[method-assign]

    def made(self) -> Tensor:
        raise NotImplementedError

    def known_as(self, name: str, *, written: bool = False) -> Tensor:
        """The tensor itself, for an operation that is not followed.

        Args:
            name: of the operation.
            written: whether it writes into the tensor.
        """
        raise NotImplementedError

    def ask(self, name: str, args: Any = (), kwargs: Any = None) -> Any:
        """What a method of the tensor returns; itself where that changes it in place."""
        written = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        real = self.known_as(name, written=written)
        args, kwargs = pytree.tree_map(made, (args, kwargs or {}), is_leaf=is_unmade)
        found = getattr(real, name)(*args, **kwargs)
        return self if found is real else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        if callable(getattr(Tensor, name)):
            return lambda *args, **kwargs: self.ask(name, args, kwargs)
        return getattr(self.known_as(name), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", str(function))
        if args and is_unmade(args[0]) and name in args[0].FUNCTIONS:
            kwargs.pop("_stacklevel", None)
            kwargs = {key: value for key, value in kwargs.items() if key not in LEGACY or value is not None}
            return getattr(args[0], name)(*args[1:], **kwargs)

        def real(value: Any) -> Any:
            return value.known_as(name) if is_unmade(value) else value

        args, kwargs = pytree.tree_map(real, (args, kwargs), is_leaf=is_unmade)
        return function(*args, **kwargs)


def followed(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the logits: what it returns, or, where that is ``NotImplemented``, what real logits return."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = method(self, *args, **kwargs) if self.now is None else NotImplemented
        return self.ask(method.__name__, args, kwargs) if found is NotImplemented else found

    return call


def made(value: Any) -> Any:
    """Logits that are there; what else is given."""
    return value.made() if is_unmade(value) else value


def is_unmade(value: Any) -> bool:
    return isinstance(value, Unmade)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: self.ask(name, others)
