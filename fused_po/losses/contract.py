"""The loss contract: a loss is a small pure function of O(N) numbers; torch differentiates it, nobody else does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fused_po.losses.batch import OPTIONAL, SIDE_INPUTS, Batch
from fused_po.stats import STATISTICS, Stats

__all__ = ["HORIZONS", "Batch", "Loss", "create", "names", "register", "total"]

# a loss must see a whole horizon at once, the planner never cuts one
HORIZONS = ("token", "sequence", "pair", "group", "batch")

_registry: dict[str, type[Loss]] = {}


@dataclass(frozen=True)
class Loss(ABC):
    """A preference or policy loss: hyper-parameters (Python numbers) and a pure function of statistics and batch.

    The clauses, held by property tests over the whole registry: *additive* over horizon-aligned splits of a call;
    *local* to a horizon and reading only what ``needs`` says; *finite* on every legal input.

    Attributes:
        name: the registered name.
        horizon: one of ``HORIZONS``.
        needs: names of the statistics and side inputs that are read, detached reads included.
        differentiates: the statistics that gradients flow through.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def horizon(self) -> str: ...

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]: ...

    @property
    def differentiates(self) -> tuple[str, ...]:
        return ("logp",)

    @abstractmethod
    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        """This batch's share of the loss, a scalar per named term; the loss is their sum.

        Args:
            stats: packed statistics (N,), those that ``needs`` names.
            batch: whole horizons.
        """

    def pattern(self, batch: Batch) -> Tensor | None:
        """(N,) with dL/dlogp = a scalar of the horizon times this, or None where there is no such thing.

        It lets one horizon larger than the memory budget be accumulated before its coefficient is known.
        """
        return None

    def metrics(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        """Scalars to log, named as TRL names them, from the statistics of the whole call."""
        return {}

    @property
    def statistics(self) -> tuple[str, ...]:
        """The part of ``needs`` that kernels must compute, in the order of ``STATISTICS``."""
        return tuple(name for name in STATISTICS if name in self.needs)

    def check(self, given: frozenset[str]) -> None:
        """Check the names of side inputs.

        Raises:
            ValueError: a name that no loss knows, one that this loss does not read, or a missing one.
        """
        reads = self.needs & SIDE_INPUTS
        unknown = given - SIDE_INPUTS
        if unknown:
            raise ValueError(f"unknown side input {_listed(unknown)}: expected some of {_listed(SIDE_INPUTS)}")
        unread = given - reads
        if unread:
            raise ValueError(f"loss {self.name!r} does not read {_listed(unread)}; it reads {_listed(reads) or 'none'}")
        missing = reads - given - OPTIONAL
        if missing:
            raise ValueError(f"loss {self.name!r} needs {_listed(missing)}")


def total(terms: dict[str, Tensor]) -> Tensor:
    """The loss: the sum of its terms."""
    return torch.stack(list(terms.values())).sum()


LossClass = TypeVar("LossClass", bound=type[Loss])


def register(name: str) -> Callable[[LossClass], LossClass]:
    """Class decorator: make a loss available as ``create(name)``."""

    def add(cls: LossClass) -> LossClass:
        if name in _registry:
            raise ValueError(f"loss {name!r} is registered already")
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def create(name: str, **hyperparameters: object) -> Loss:
    """Make a loss by name.

    Args:
        name: one of ``names()``.
        hyperparameters: numbers named as in TRL; see the loss's docstring for defaults.

    Raises:
        ValueError: an unknown name, an unknown hyper-parameter, or a value outside its range.
    """
    if name not in _registry:
        raise ValueError(f"unknown loss {name!r}: expected one of {', '.join(names())}")
    cls = _registry[name]
    known = {field.name for field in fields(cls)}
    unknown = frozenset(hyperparameters) - known
    if unknown:
        raise ValueError(f"loss {name!r} has no hyper-parameter {_listed(unknown)}; it has {_listed(known) or 'none'}")
    return cls(**hyperparameters)


def names() -> tuple[str, ...]:
    """The registered losses, sorted."""
    return tuple(sorted(_registry))


def _listed(items: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(items))
