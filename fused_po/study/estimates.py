"""What a few seeds say about a mean, and a few checkpoints about a curve. A number that is not defined is NaN."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats

__all__ = ["around_line", "fluctuation", "mean_and_error", "ratio", "two_sided_p", "written"]


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


def two_sided_p(values: Sequence[float]) -> float:
    """How often the mean of that many independent Gaussian numbers around 0 is at least as many of its standard errors
    from 0 (Student's t test); NaN where the mean or its error is.
    """
    mean, error = mean_and_error(values)
    if math.isnan(error):
        return math.nan
    # scipy warns, and answers NaN or 0, where all values are equal
    if error == 0.0:
        return 0.0 if mean else 1.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def around_line(times: Sequence[float], values: Sequence[float]) -> float:
    """The variance of values around their straight line in time, without bias where they scatter independently; NaN
    for fewer than three.
    """
    if len(values) < 3:
        return math.nan
    slope, intercept = statistics.linear_regression(times, values)
    residuals = (v - slope * t - intercept for t, v in zip(times, values, strict=True))
    return sum(r * r for r in residuals) / (len(values) - 2)


def fluctuation(times: Sequence[float], draws: Sequence[Sequence[float]]) -> float:
    """The share of a curve's mean square that is neither its level nor its trend: 0 for a straight line, up to about 1
    for a curve without either.

    What independent draws at the same time differ in is no change of the curve: their variance gives the error of their
    mean, which is taken off both. The result can come out below 0, and does so in half of the cases where the curve is
    a straight line.

    Args:
        times: of the checkpoints.
        draws: for each time, one value where it is known exactly, or two and more independent estimates of it.

    Returns:
        NaN where the curve is smaller than the error of drawing it, or 0 throughout: a share of nothing.
    """
    means = [statistics.fmean(row) for row in draws]
    noise = statistics.fmean(statistics.variance(row) / len(row) if len(row) > 1 else 0.0 for row in draws)
    size = statistics.fmean(mean * mean for mean in means) - noise
    if not size > noise:
        return math.nan
    return (around_line(times, means) - noise) / size
