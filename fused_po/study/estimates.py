"""What a few seeds say about a mean. A number that is not defined is NaN."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy import optimize, special, stats

__all__ = ["LEVEL", "Estimate", "holm", "mean_and_error", "power", "ratio", "seeds_for", "two_sided_p", "written"]

# of all tests together, and of what lies outside an interval
LEVEL = 0.05


def ratio(part: float, whole: float) -> float:
    """``part / whole``; NaN where the whole is 0."""
    return part / whole if whole else math.nan


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; both NaN where a value is not finite, the error NaN for fewer than two."""
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def written(values: Sequence[float]) -> str:
    """The mean of seeds and its error in words; where there is none, in how many it is missing."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        missing = sum(not math.isfinite(value) for value in values)
        return f"undefined in {missing} of {len(values)} seeds"
    return f"{mean:.3g}" + ("" if math.isnan(error) else f" ± {error:.2g}")


def two_sided_p(values: numpy.ndarray) -> numpy.ndarray:
    """How often the mean of n independent Gaussian numbers around 0 is at least as many of its standard errors from 0
    (Student's t test), over the last axis: (..., n) -> (...).

    NaN where a value is not finite or n is below 2. Values that are all alike have no standard error, and say no more
    than their sign: 2 ** (1 - n), the p of the sign test, and 1 where all are 0.
    """
    values = numpy.asarray(values, dtype=float)
    first, count = values[..., :1], values.shape[-1]
    alike = (values == first).all(-1)
    if count < 2:
        return numpy.full(values.shape[:-1], math.nan)
    # scipy warns of numbers that are nearly alike, and of infinite ones
    with numpy.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        kept = numpy.where(alike[..., None], numpy.arange(count, dtype=float), values)
        kept = numpy.where(numpy.isfinite(values).all(-1, keepdims=True), kept, math.nan)
        p = stats.ttest_1samp(kept, 0.0, axis=-1).pvalue
    alike &= numpy.isfinite(values).all(-1)
    return numpy.where(alike, numpy.where(first[..., 0] == 0.0, 1.0, 2.0 ** (1 - count)), p)


@dataclass(frozen=True)
class Estimate:
    """The mean over n seeds, and how large it is beside their spread.

    Attributes:
        mean, low, high: the mean and its interval by Student's t at 95 %.
        d, d_low, d_high: the mean over the standard deviation of single seeds, Hedges' g, without the bias of small n
            (Hedges, J. Educ. Stat. 6, 1981), and the 95 % interval, from the noncentral t, of what it estimates.
    """

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    d: float = math.nan
    d_low: float = math.nan
    d_high: float = math.nan

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """Of the numbers of seeds; all NaN where one of them is not finite."""
        mean, error = mean_and_error(values)
        if not error > 0.0:
            return Estimate(mean)
        n, freedom = len(values), len(values) - 1
        low, high = map(float, stats.t.interval(1.0 - LEVEL, freedom, mean, error))
        if freedom < 2:
            return Estimate(mean, low, high)
        correction = special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2) - math.log(freedom / 2) / 2
        t, sign, unit = abs(mean / error), math.copysign(1.0, mean), 1.0 / math.sqrt(n)
        # the correction is of the estimate; the interval has no bias to correct
        ends = sorted(sign * unit * _noncentrality(t, freedom, p) for p in (LEVEL / 2, 1.0 - LEVEL / 2))
        return Estimate(mean, low, high, sign * unit * math.exp(correction) * t, *ends)

    @property
    def text(self) -> str:
        """The mean and its interval in words."""
        if math.isnan(self.mean):
            return "undefined"
        return f"{self.mean:.3g}" + ("" if math.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]")

    @property
    def effect(self) -> str:
        """The effect size and its interval in words."""
        return "-" if math.isnan(self.d) else f"{self.d:.2f} [{self.d_low:.2f}, {self.d_high:.2f}]"


def _noncentrality(t: float, freedom: int, p: float) -> float:
    """The shift for which a noncentral t is at most ``t``, which is not negative, with probability ``p``."""

    def excess(shift: float) -> float:
        found = float(stats.nct.cdf(t, freedom, shift))
        # scipy says NaN where the answer is 0 or 1 to all digits
        return (float(shift < t) if math.isnan(found) else found) - p

    # uncertain by a few units, and by a multiple of t where n is small
    reach = 10.0 + abs(t)
    return float(optimize.brentq(excess, t - reach, t + reach))


def holm(p: Sequence[float]) -> list[float]:
    """p corrected for being one of several by Holm's step-down procedure (Scand. J. Stat. 6, 1979): where all at or
    below a level count as found, one that is about nothing is among them no more often than the level says.

    A test without p stays NaN and counts among the several.
    """
    # takes more than a second to import
    from statsmodels.stats.multitest import multipletests

    if not p:
        return []
    given = [1.0 if math.isnan(one) else one for one in p]
    corrected = multipletests(given, LEVEL, "holm")[1].tolist()
    return [math.nan if math.isnan(one) else new for one, new in zip(p, corrected, strict=True)]


def power(seeds: int, claims: int, effect: float = 1.0) -> float:
    """How often a claim with a mean of ``effect`` standard deviations is found by the first, strictest step of Holm's
    procedure among ``claims``; NaN for fewer than two seeds.
    """
    from statsmodels.stats.power import TTestPower

    return float(TTestPower().power(effect, seeds, LEVEL / claims)) if seeds > 1 else math.nan


def seeds_for(wanted: float, claims: int, effect: float = 1.0) -> int:
    """The fewest seeds of which ``power`` is at least ``wanted``, below 1."""
    return next(seeds for seeds in range(2, 10_000) if power(seeds, claims, effect) >= wanted)
