"""What a loss declares, held against what it does: mistakes in a loss of one's own are named, and not computed with.

What costs a look at values or a few operations is done once for each loss and number of tokens, and never in a trace.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fused_po.losses.batch import SIDE_INPUTS
from fused_po.losses.contract import Batch, Loss, meant, per_token
from fused_po.ops.checks import looks_at
from fused_po.stats import STATISTICS, Stats

__all__ = ["check_pattern", "off_pattern", "pattern_error", "pattern_of", "terms_of"]

# what a coefficient may be off its pattern, squared: far above rounding, far below a pattern that is wrong
TOLERANCE = 1e-8
# losses and numbers of tokens that were found in order; forgotten where there are very many
_in_order: set[tuple[str, Loss, int]] = set()
MOST = 4096


def terms_of(loss: Loss, stats: Stats, batch: Batch) -> dict[str, Tensor]:
    """Call a loss, and see that it returns a scalar for each named term.

    Args:
        loss: any loss.
        stats: packed statistics (N,).
        batch: the same tokens, whole horizons.

    Raises:
        ValueError: it returned something else, reads what its ``needs`` does not name, or sums over what its
            ``horizon`` does not hold together.
    """
    if torch.compiler.is_compiling():
        return _checked(loss, loss(stats, batch))
    known = _known("horizon", loss, batch)
    try:
        # a chunk may cut what the loss sums over: seen where all is in one chunk yet
        terms = loss(stats, batch if known else _watched(_OfHorizon, batch, loss))
    except ValueError:
        raise
    except Exception as error:
        message = _undeclared(loss, stats, batch)
        if message is None:
            raise
        raise ValueError(message) from error
    found = _checked(loss, terms)
    if not known:
        _remember("horizon", loss, batch)
    return found


def pattern_of(loss: Loss, batch: Batch) -> Tensor | None:
    """The pattern of a loss (N,), 0 where a row carries no loss; None where it has none.

    Raises:
        ValueError: it has another shape.
    """
    found = loss.pattern(batch)
    if found is None:
        return None
    found = per_token(found, batch, "pattern", loss)
    return found if batch.mask is None else torch.where(batch.mask, found, torch.zeros_like(found))


def check_pattern(loss: Loss, c: Tensor, stats: Stats, batch: Batch, *, wait: bool = False) -> None:
    """Whether the coefficients of each horizon are one number times the pattern.

    A pattern is used where a horizon is larger than the memory budget, which the first runs of a loss hardly meet. So
    it is held against the coefficients wherever looking costs no wait.

    Args:
        loss: any loss.
        c: (N,) float64, dL/dlogp.
        stats: packed statistics (N,).
        batch: the same tokens, whole horizons.
        wait: look in every call, and on a GPU too.

    Raises:
        ValueError: they are not.
    """
    if type(loss).pattern is Loss.pattern or loss.horizon == "token":
        return
    if not wait and (not looks_at(c) or _known("pattern", loss, batch)):
        return
    pattern = pattern_of(loss, batch)
    if pattern is None:
        return
    pattern = pattern.to(c.dtype)
    dots, squares = _by_horizon(loss, c * pattern, pattern.square(), batch)
    number = batch.spread(dots / torch.where(squares > 0, squares, 1.0))
    rest, whole = _by_horizon(loss, (c - number * pattern).square(), c.square(), batch)
    if bool((rest > TOLERANCE * whole).any() & _finite(stats, batch)):
        raise pattern_error(loss)
    _remember("pattern", loss, batch)


def off_pattern(c: Tensor, pattern: Tensor, number: Tensor, stats: Stats, batch: Batch) -> Tensor:
    """Whether the coefficients of one horizon are not ``number * pattern``, () bool.

    Args:
        c: (N,), as they were rounded.
        pattern: (N,).
        number: () float64.
        stats: packed statistics (N,).
        batch: the same tokens.
    """
    limits = torch.finfo(c.dtype)
    rest = (c.double() - number * pattern).square().sum()
    # numbers below the smallest normal one have few digits, and those above the largest were cut off
    off = rest > TOLERANCE * c.double().square().sum() + limits.tiny**2
    return off & (c.abs().amax() < limits.max) & _finite(stats, batch)


def pattern_error(loss: Loss) -> ValueError:
    return ValueError(
        f"loss {loss.name!r} has a pattern, but within a {loss.horizon}, its horizon, dL/dlogp is not one number times "
        "it: leave pattern out, which only costs time where the horizon is larger than the memory budget, or return "
        "what dL/dlogp is a multiple of (signs / batch.token_lengths where log-probs are divided by the length)"
    )


@dataclass(frozen=True)
class _OfHorizon(Batch):
    """A batch that refuses sums over more than the horizon of ``loss``."""

    loss: Any = None

    def sum_per_sequence(self, values: Tensor) -> Tensor:
        self._whole("sequence", "sums over a sequence")
        return super().sum_per_sequence(values)

    def spread(self, values: Tensor) -> Tensor:
        self._whole("sequence", "takes values of whole sequences")
        return super().spread(values)

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        self._whole("pair", "compares the two answers of a pair")
        return super().halves(values)

    def _whole(self, needed: str, what: str) -> None:
        smaller = {"sequence": ("token",), "pair": ("token", "sequence")}[needed]
        if self.loss.horizon in smaller:
            raise ValueError(
                f"loss {self.loss.name!r} {what}, but its horizon is {self.loss.horizon!r}, so a long call would be "
                f"cut between: set horizon = {needed!r}"
            )


@dataclass(frozen=True)
class _Declared(_OfHorizon):
    """One that also refuses side inputs that ``needs`` does not name."""

    def token(self, name: str) -> Tensor | None:
        return self._needed(name, super().token(name))

    def sequence(self, name: str) -> Tensor | None:
        return self._needed(name, super().sequence(name))

    def scalar(self, name: str) -> Tensor | None:
        return self._needed(name, super().scalar(name))

    def _needed(self, name: str, value: Tensor | None) -> Tensor | None:
        if value is None and name not in SIDE_INPUTS:
            raise ValueError(
                f"loss {self.loss.name!r} reads an unknown side input {name!r}{meant([name], SIDE_INPUTS)}"
            )
        if value is None and name not in self.loss.needs:
            raise ValueError(_add(self.loss, name))
        return value


class _DeclaredStats(Stats):
    """Statistics of which only those that were made may be read."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if found is None and name in STATISTICS:
            raise _NotMade(name)
        return found


class _NotMade(ValueError):
    pass


def _undeclared(loss: Loss, stats: Stats, batch: Batch) -> str | None:
    """What a loss that failed reads without having declared it, in words; None where that is not why."""
    try:
        loss(_DeclaredStats(**stats.present()), _watched(_Declared, batch, loss))
    except _NotMade as error:
        return _add(loss, str(error))
    except ValueError as error:
        return str(error)
    except Exception:
        return None
    return None


def _add(loss: Loss, name: str) -> str:
    return f"loss {loss.name!r} reads {name!r}, which its needs does not name: add {name!r} to needs"


def _watched(kind: type[_OfHorizon], batch: Batch, loss: Loss) -> Batch:
    return kind(**{field.name: getattr(batch, field.name) for field in fields(Batch)}, loss=loss)


def _checked(loss: Loss, terms: object) -> dict[str, Tensor]:
    if not isinstance(terms, dict) or not terms:
        raise ValueError(
            f"loss {loss.name!r} must return a dict of named terms, as {{'preference': value}}: got {_said(terms)}"
        )
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim != 0:
            raise ValueError(
                f"each term of loss {loss.name!r} must be a tensor of shape (), as batch.mean_pairs, mean_sequences "
                f"and mean_tokens return: got {_said(term)} for {name!r}"
            )
    return terms


def _said(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _finite(stats: Stats, batch: Batch) -> Tensor:
    """Whether all that a pattern is checked by is finite, (): losses bound what is not, where its slope is 0."""
    assert stats.logp is not None
    given = [*batch.per_token.values(), *batch.per_sequence.values()]
    return torch.stack([values.isfinite().all() for values in (stats.logp, *given)]).all()


def _by_horizon(loss: Loss, first: Tensor, second: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Two (N,) summed over the horizon of each sequence: (B,), (B,)."""
    sums = batch.sum_per_sequence(torch.stack([first, second], 1))  # (B, 2)
    if loss.horizon == "pair":
        chosen, rejected = batch.halves(sums)
        sums = (chosen + rejected).repeat(2, 1)
    elif loss.horizon != "sequence":
        sums = sums.sum(0, keepdim=True).expand_as(sums)
    one, other = sums.unbind(1)
    return one, other


def _known(what: str, loss: Loss, batch: Batch) -> bool:
    try:
        return (what, loss, batch.chosen.shape[0]) in _in_order
    except TypeError:
        # a hyper-parameter without a hash
        return False


def _remember(what: str, loss: Loss, batch: Batch) -> None:
    if len(_in_order) >= MOST:
        _in_order.clear()
    try:
        _in_order.add((what, loss, batch.chosen.shape[0]))
    except TypeError:
        return
