"""Numbers of any precision that carry their derivatives: what formulas are written in, to be differentiated exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mpmath import mp, mpf

__all__ = ["D", "const", "exp", "expm1", "log", "logsigmoid", "minimum", "relu", "sigmoid", "total"]


Slopes = dict[int, mpf]


class D:
    """A value, its partial derivatives by index of the variable, and of each the sum of the absolute values of what it
    was added up from: what cancels in it leaves the rounding of that behind.
    """

    __slots__ = ("added", "d", "v")

    def __init__(self, v: mpf, d: Slopes | None = None, added: Slopes | None = None) -> None:
        self.v, self.d = mpf(v), d or {}
        self.added = {i: abs(x) for i, x in self.d.items()} if added is None else added

    def map(self, value: mpf, slope: mpf) -> D:
        """f(self), from f and f' there; a slope of 0 drops whatever it would multiply."""
        if not slope:
            return D(value)
        return D(value, _scaled(self.d, slope), _scaled(self.added, abs(slope)))

    def __add__(self, other: D | float) -> D:
        other = const(other)
        return D(self.v + other.v, _sum(self.d, other.d), _sum(self.added, other.added))

    def __neg__(self) -> D:
        return self.map(-self.v, mpf(-1))

    def __sub__(self, other: D | float) -> D:
        return self + -const(other)

    def __rsub__(self, other: float) -> D:
        return const(other) - self

    def __mul__(self, other: D | float) -> D:
        other = const(other)
        mine, theirs = self.map(self.v, other.v), other.map(other.v, self.v)
        return D(self.v * other.v, _sum(mine.d, theirs.d), _sum(mine.added, theirs.added))

    def __truediv__(self, other: D | float) -> D:
        other = const(other)
        return self * other.map(1 / other.v, -1 / other.v**2)

    def __abs__(self) -> D:
        return self.map(abs(self.v), mp.sign(self.v))

    __radd__, __rmul__ = __add__, __mul__

    def square(self) -> D:
        return self * self

    def detach(self) -> D:
        return D(self.v)

    def clamp(self, low: float = -mp.inf, high: float = mp.inf) -> D:
        """Constant outside of [low, high]."""
        if self.v < low:
            return D(low)
        return D(high) if self.v > high else self


def _scaled(slopes: Slopes, factor: mpf) -> Slopes:
    return {i: factor * x for i, x in slopes.items()}


def _sum(a: Slopes, b: Slopes) -> Slopes:
    return {i: a.get(i, 0) + b.get(i, 0) for i in a.keys() | b.keys()}


def const(value: D | float) -> D:
    return value if isinstance(value, D) else D(mpf(value))


def total(values: Iterable[D]) -> D:
    found = D(mpf(0))
    for value in values:
        found = found + value
    return found


def _function(f: Callable[[mpf], mpf], slope: Callable[[mpf], mpf]) -> Callable[[D], D]:
    return lambda x: const(x).map(f(const(x).v), slope(const(x).v))


def _sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mp.exp(-x)) if x >= 0 else mp.exp(x) / (1 + mp.exp(x))


exp = _function(mp.exp, mp.exp)
log = _function(mp.log, lambda x: 1 / x)
logsigmoid = _function(lambda x: min(x, mpf(0)) - mp.log1p(mp.exp(-abs(x))), lambda x: _sigmoid(-x))
relu = _function(lambda x: max(x, mpf(0)), lambda x: mpf(1 if x > 0 else 0))


def _to_an_ulp_of_one(found: D, x: D) -> D:
    """torch makes the slope of what lies near 1 from the value, and so to an ulp of 1."""
    return D(found.v, found.d, _sum(found.added, _scaled(x.added, mpf(1e-3))))


def sigmoid(x: D) -> D:
    """Its slope is s (1 - s)."""
    x = const(x)
    return _to_an_ulp_of_one(x.map(_sigmoid(x.v), _sigmoid(x.v) * _sigmoid(-x.v)), x)


def expm1(x: D) -> D:
    """Its slope is the value plus 1."""
    x = const(x)
    return _to_an_ulp_of_one(x.map(mp.expm1(x.v), mp.exp(x.v)), x)


def minimum(a: D, b: D) -> D:
    """The smaller; where both are equal, with half of the derivatives of each, as torch has it."""
    if a.v == b.v:
        both = (a + b) * mpf("0.5")
        return D(a.v, both.d, both.added)
    return a if a.v < b.v else b
