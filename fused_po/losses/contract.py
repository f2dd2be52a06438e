"""The loss contract: a loss is a small pure function of O(N) numbers; torch differentiates it, nobody else does."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_po.losses.batch import OPTIONAL, SIDE_INPUTS, Batch
from fused_po.stats import STATISTICS, Stats

__all__ = ["HORIZONS", "Batch", "Loss", "check_terms", "has_sides", "listed", "meant", "require_sides", "total"]

# a loss must see a whole horizon at once, the planner never cuts one
HORIZONS = ("token", "sequence", "pair", "group", "batch")


@dataclass(frozen=True)
class Loss(ABC):
    """A preference or policy loss: hyper-parameters (Python numbers) and a pure function of statistics and batch.

    The clauses, held by property tests over the whole registry: *additive* over horizon-aligned splits of a call;
    *local* to a horizon and reading only what ``needs`` says; *finite* on every legal input.

    Attributes:
        name: the registered name.
        horizon: one of ``HORIZONS``.
        needs: names of the statistics and side inputs that the value reads, detached reads included.
        reports: names of further statistics that the metrics read.
        differentiates: the statistics that gradients flow through.
        sided: names of the terms that have sides; others (KL, NLL, entropy) have none.
        weighs_sequences: the loss's own weight is one per sequence, not per token.
    """

    name: ClassVar[str]
    sided: ClassVar[frozenset[str]] = frozenset({"preference", "policy"})
    weighs_sequences: ClassVar[bool] = True
    # what a subclass reads beyond its base; not by super().needs, which torch.compile can't trace
    also_needs: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def horizon(self) -> str: ...

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]: ...

    @property
    def reports(self) -> tuple[str, ...]:
        return ()

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

    def role(self, batch: Batch) -> Tensor:
        """The side of each token (N,): +1 to be learned, -1 to be unlearned, 0 neither (arXiv 2512.00778)."""
        return torch.zeros_like(batch.chosen, dtype=torch.float64)

    def weight(self, c: Tensor, batch: Batch) -> Tensor:
        """The loss's own weight of each token (N,), >= 0 (arXiv 2512.00778: what reweighting changes).

        Args:
            c: (N,), the coefficients of the sided terms.
        """
        return c.abs()

    @property
    def has_unsided_terms(self) -> bool:
        """Some terms have no side."""
        return False

    def silent(self, batch: Batch) -> Tensor | None:
        """(N,) bool, rows whose coefficients are exactly 0 whatever the policy says; None where none is known.

        They are known before the policy runs, so their gradient is never computed.
        """
        return None

    @property
    def not_additive(self) -> str | None:
        """Why micro-batches do not add up to the full batch, whatever normalisers are given; None where they do.

        Each must keep its horizons whole.
        """
        return "it compares what is in one call" if self.horizon == HORIZONS[-1] else None

    @property
    def parts(self) -> tuple[tuple[float, Loss], ...]:
        """The losses that this one is a weighted sum of, each with sides of its own."""
        return ((1.0, self),)

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
        """What kernels must compute for value and metrics, in the order of ``STATISTICS``."""
        return tuple(name for name in STATISTICS if name in self.needs or name in self.reports)

    def check(self, given: frozenset[str], arguments: frozenset[str] = frozenset()) -> None:
        """Check the names of side inputs.

        Args:
            arguments: other names that the operation takes, which may have been meant.

        Raises:
            ValueError: a name that no loss knows, one that this loss does not read, or a missing one.
        """
        reads = self.needs & SIDE_INPUTS
        unknown = given - SIDE_INPUTS
        if unknown:
            raise ValueError(
                f"unknown argument or side input {listed(unknown)}{meant(unknown, SIDE_INPUTS | arguments)}: "
                f"expected side inputs among {listed(SIDE_INPUTS)}"
            )
        unread = given - reads
        if unread:
            raise ValueError(f"loss {self.name!r} does not read {listed(unread)}; it reads {listed(reads) or 'none'}")
        missing = reads - given - OPTIONAL
        if missing:
            raise ValueError(f"loss {self.name!r} needs {listed(missing)}")


def has_sides(loss: Loss) -> bool:
    """Whether some part of a loss says which side its tokens are on."""
    return any(type(part).role is not Loss.role for _, part in loss.parts)


def require_sides(loss: Loss, what: str) -> None:
    """Whether some token of a loss has a side.

    Args:
        what: would do nothing without one.

    Raises:
        ValueError: no part of the loss has a ``role``.
    """
    if not has_sides(loss):
        raise ValueError(
            f"{what} does nothing to loss {loss.name!r}, which has no sides: a loss has them where its class defines "
            "role(batch) -> (N,), +1 for tokens to be learned, -1 for tokens to be unlearned, 0 for neither"
        )


def check_terms(loss: Loss, names: Iterable[str]) -> None:
    """Whether the terms of a loss are what it declares of their sides.

    Args:
        names: of the terms that it returned.

    Raises:
        ValueError: it has a ``role`` but no term with sides, or terms without sides that it does not announce.
    """
    unsided = frozenset(names) - loss.sided
    if has_sides(loss) and unsided and unsided == frozenset(names):
        raise ValueError(
            f"loss {loss.name!r} has sides, but none of its terms ({listed(unsided)}) is declared to have them: name "
            f"the term {listed(Loss.sided).replace(', ', ' or ')}, or declare sided: ClassVar = frozenset({{...}})"
        )
    if unsided and not loss.has_unsided_terms:
        raise ValueError(
            f"loss {loss.name!r} returns terms without sides ({listed(unsided)}), so its has_unsided_terms must be True"
        )


def total(terms: dict[str, Tensor]) -> Tensor:
    """The loss: the sum of its terms."""
    return torch.stack(list(terms.values())).sum() if len(terms) > 1 else next(iter(terms.values()))


def meant(wrong: Iterable[str], known: Iterable[str]) -> str:
    """Words for a message: the known name nearest to each wrong one; nothing where none is near."""
    choices = sorted(known)
    near = [match for name in sorted(wrong) for match in difflib.get_close_matches(str(name), choices, 1, 0.7)]
    return f" (did you mean {', '.join(dict.fromkeys(near))}?)" if near else ""


def listed(items: Iterable[str]) -> str:
    """Words for a message, sorted."""
    return ", ".join(sorted(items))
