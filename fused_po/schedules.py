"""Weights that change over the training: functions of the fraction of it that is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

__all__ = ["Linear", "Schedule", "lines", "require_real"]

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Linear:
    """A schedule: from ``start`` at the beginning of training to ``end``, in a straight line.

    Args:
        start: the value at the beginning.
        end: the value at the end.
        begin: 0.0, the fraction of the training at which the line begins.
        finish: 1.0, the one at which it ends; 0 <= begin < finish <= 1.
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "end", "begin", "finish"):
            require_real(name, getattr(self, name))
        if not 0.0 <= self.begin < self.finish <= 1.0:
            raise ValueError(f"a schedule runs within [0, 1]: got begin {self.begin}, finish {self.finish}")

    def __call__(self, progress: float) -> float:
        share = min(max((progress - self.begin) / (self.finish - self.begin), 0.0), 1.0)
        return self.start + (self.end - self.start) * share


def lines(positive: object, negative: object, begin: float, finish: float) -> tuple[Linear, Linear]:
    """The schedules of both sides, each from its weight at the beginning to that at the end.

    Raises:
        ValueError: a side that is not two numbers, or what ``Linear`` raises.
    """
    return _line("positive", positive, begin, finish), _line("negative", negative, begin, finish)


def require_real(name: str, value: object, otherwise: str = "") -> None:
    """Raise ValueError where a value is not a number; ``otherwise`` says what else it may be."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a number{otherwise}: got {value!r}")


def _line(name: str, ends: object, begin: float, finish: float) -> Linear:
    if not isinstance(ends, Sequence) or len(ends) != 2:
        raise ValueError(f"{name} must be two numbers, its weights at the beginning and at the end: got {ends!r}")
    return Linear(ends[0], ends[1], begin, finish)
