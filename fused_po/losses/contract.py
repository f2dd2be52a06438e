"""The loss contract: a loss is a small pure function of O(N) numbers; torch differentiates it, nobody else does."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fused_po.losses.batch import OPTIONAL, SIDE_INPUTS, Batch
from fused_po.stats import DIFFERENTIABLE, STATISTICS, Stats

__all__ = [
    "HORIZONS",
    "Batch",
    "Loss",
    "Named",
    "check_declared",
    "check_terms",
    "has_sides",
    "listed",
    "meant",
    "per_token",
    "require_sides",
    "total",
]

Value = TypeVar("Value")

# a loss must see a whole horizon at once, the planner never cuts one
HORIZONS = ("token", "sequence", "pair", "group", "batch")


@dataclass(frozen=True)
class Loss(ABC):
    """A preference or policy loss: hyper-parameters (Python numbers) and a pure function of statistics and batch.

    To write one, derive a frozen dataclass, declare ``horizon`` and ``needs``, return the value from ``__call__`` and
    put ``register(name)`` on top. Tests hold every registered loss to three clauses. *Additive*: a call may be cut
    between horizons, and the values and gradients of the pieces sum to those of the whole. *Local*: the coefficients
    of a horizon depend on nothing outside it, and on nothing that ``needs`` does not name. *Finite* on legal inputs.

    Attributes:
        name: the registered name.
        horizon: what the loss must see whole to know its coefficients, one of ``HORIZONS``. A call is never cut inside
            one.
        needs: names of the statistics and side inputs that the value reads, detached reads included.
        reports: names of further statistics that only the metrics read.
        differentiates: names of the statistics that gradients flow through.
        sided: names of the terms of the value whose tokens have a side, see ``role``: those that a ``Split`` scales.
            Other terms (KL, NLL, entropy) have none.
        weighs_sequences: the loss's own weight, see ``weight``, is one number for each sequence; False: for each token.
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
        """The loss of some whole horizons: a scalar for each named term. The sum of the terms over all horizons of a
        call is the loss, so means divide by what the ``batch`` says of the whole call (``batch.mean_pairs`` does).

        Args:
            stats: packed statistics (N,), those that ``needs`` names: the loss tokens of all sequences in a row, and
                not (B, S). ``batch.sum_per_sequence`` makes (B,) of them.
            batch: the same tokens, with their side inputs.
        """

    def role(self, batch: Batch) -> Tensor:
        """The side of each token (N,), which a ``Split`` goes by (arXiv 2512.00778): +1 is to be learned (a chosen
        answer, a positive advantage), -1 to be unlearned, 0 neither.
        """
        return torch.zeros_like(batch.chosen, dtype=torch.float64)

    def weight(self, c: Tensor, batch: Batch) -> Tensor:
        """How much each token counts (N,), >= 0: what the reweighting of a ``Split`` changes (arXiv 2512.00778). By
        default the size of its coefficient.

        Args:
            c: (N,), dL/dlogp of the terms that have sides.
        """
        return c.abs()

    @property
    def has_unsided_terms(self) -> bool:
        """Some terms of the value have no side: their names are not in ``sided``."""
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
        """Known numbers (N,) of which dL/dlogp, over the tokens of a horizon, is one unknown multiple; None: unknown.

        For pairs that are compared by summed log-probs: +1 on chosen tokens, -1 on rejected ones. Gradients of a
        horizon larger than the memory budget can then be summed before the multiple is known: 3 GEMMs and not 4.
        Where log-probs are divided by the length, the signs are too.

        A wrong one is an error on a CPU, in short calls and long ones. Elsewhere it makes the gradient of a horizon
        larger than the budget NaN, and an error with ``FUSED_PO_CHECK=1``.
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
            ValueError: a name that no loss knows, one that this loss does not read, or a missing one; or what
                ``check_declared`` raises.
        """
        needs = self.needs
        # in few steps where all is well
        if not isinstance(needs, (frozenset, set)) or needs - _NAMES or self.horizon not in HORIZONS:
            check_declared(self)
        reads = needs & SIDE_INPUTS
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


def check_declared(loss: Loss | type[Loss]) -> None:
    """Whether a loss declares names that are known. Of a class, what only its instances know is left out.

    Raises:
        ValueError: an unknown horizon, statistic or side input, something else than a set of names, or a derivative in
            a statistic that the loss does not read.
    """
    who = f"loss {loss.name!r}"
    declared: dict[str, Any] = {name: getattr(loss, name) for name in ("horizon", "needs", "reports", "differentiates")}
    if isinstance(loss, type):
        # properties
        declared = {name: value for name, value in declared.items() if not hasattr(type(value), "__get__")}
    horizon = declared.pop("horizon", HORIZONS[0])
    if not isinstance(horizon, str) or horizon not in HORIZONS:
        hint = meant([str(horizon)], HORIZONS)
        raise ValueError(f"{who} has no known horizon{hint}: wanted one of {', '.join(HORIZONS)}, got {horizon!r}")
    for what, names in declared.items():
        kinds, words, known = _DECLARED[what]
        if not isinstance(names, kinds) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{what} of {who} must be {words}: got {names!r}")
        unknown = frozenset(names) - known
        if unknown:
            raise ValueError(
                f"{what} of {who} names unknown {listed(unknown)}{meant(unknown, known)}: wanted some of "
                f"{listed(known)}"
            )
    differentiates = declared.get("differentiates", ())
    unread = [name for name in differentiates if "needs" in declared and name not in declared["needs"]]
    if unread:
        raise ValueError(f"{who} differentiates {listed(unread)}, so add {listed(unread)} to needs")


_NAMES = frozenset(STATISTICS) | SIDE_INPUTS
# of each declaration: its types, these in words, and the names that it may hold
_DECLARED: dict[str, tuple[Any, str, frozenset[str]]] = {
    "needs": ((frozenset, set), "a set of names, as frozenset({'logp', 'ref_logp'})", _NAMES),
    "reports": ((tuple, list), "a tuple of names, as ('entropy',)", frozenset(STATISTICS)),
    "differentiates": ((tuple, list), "a tuple of names, as ('logp',)", frozenset(DIFFERENTIABLE)),
}


def per_token(values: object, batch: Batch, what: str, loss: Loss) -> Tensor:
    """What a method of a loss returned, if it is one number for each loss token, (N,).

    Args:
        values: what it returned.
        batch: the tokens.
        what: the name of the method.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, Tensor) or values.shape != batch.chosen.shape:
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise ValueError(
            f"{what} of loss {loss.name!r} must be (N,), one per loss token, here ({batch.chosen.shape[0]},): got "
            f"{got}; batch.spread makes (N,) of one per sequence, (B,)"
        )
    return values


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


class Named(dict[str, Value]):
    """A dict whose KeyError says which names there are.

    Args:
        what: one of its values is, for the message.
        values: by name.
    """

    def __init__(self, what: str, values: Mapping[str, Value]) -> None:
        super().__init__(values)
        self._what = what

    def __missing__(self, name: str) -> Value:
        raise KeyError(f"no {self._what} {name!r}{meant([name], self)}: there is {listed(self) or 'none'}")
