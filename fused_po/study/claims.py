"""What is claimed of preference optimization, as numbers, and what the runs say to it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy import ndarray

from fused_po.study.estimates import LEVEL, Estimate, holm, two_sided_p, written
from fused_po.study.run import Results

__all__ = ["Claim", "Curves", "Finding", "decide", "judge", "late", "mean_of", "way"]

FEWEST_SEEDS = 3


class Curves:
    """The numbers of a study as curves over its checkpoints."""

    def __init__(self, results: Results) -> None:
        found: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {}
        for point in results.points:
            run = point.method, point.arm, point.metric
            found.setdefault(run, {})[point.seed, point.step] = point.value
        self.seeds = sorted({point.seed for point in results.points})
        self._steps = {run: sorted({step for _, step in values}) for run, values in found.items()}
        self._arrays = {
            run: numpy.array([[values.get((seed, step), math.nan) for step in self._steps[run]] for seed in self.seeds])
            for run, values in found.items()
        }

    @staticmethod
    def of(arrays: Mapping[tuple[str, str, str], ndarray]) -> Curves:
        """Curves that are there already: (method, arm, metric) -> (..., seeds, checkpoints)."""
        curves = Curves(Results())
        curves._arrays = dict(arrays)
        curves._steps = {run: list(range(values.shape[-1])) for run, values in arrays.items()}
        curves.seeds = list(range(next(iter(arrays.values())).shape[-2]))
        return curves

    def runs(self) -> list[tuple[str, str]]:
        """(method, arm), in the order of the numbers."""
        return list(dict.fromkeys(run[:2] for run in self._arrays))

    def metrics(self, method: str, arm: str = "full") -> list[str]:
        """What was measured of a run."""
        return [run[2] for run in self._arrays if run[:2] == (method, arm)]

    def steps(self, method: str, metric: str, arm: str = "full") -> list[int]:
        """Where a curve was measured, in updates."""
        return self._steps[method, arm, metric]

    def array(self, method: str, metric: str, arm: str = "full") -> ndarray:
        """(seeds, checkpoints), NaN where a seed has no number.

        Raises:
            KeyError: no seed has any.
        """
        return self._arrays[method, arm, metric]


def mean_of(values: ndarray) -> ndarray:
    """The mean over the last axis of what is defined; NaN where nothing is."""
    with warnings.catch_warnings():
        # of a mean of nothing
        warnings.simplefilter("ignore", RuntimeWarning)
        found: ndarray = numpy.nanmean(values, axis=-1)
    return found


def way(curves: Curves, method: str, metric: str, arm: str = "full") -> ndarray:
    """The mean between the start, common to all runs, and the final model: (seeds,)."""
    return mean_of(curves.array(method, metric, arm)[..., 1:-1])


def late(curves: Curves, method: str, metric: str, arm: str = "full") -> ndarray:
    """The mean over the last third of the checkpoints: (seeds,)."""
    values = curves.array(method, metric, arm)
    return mean_of(values[..., -max(1, values.shape[-1] // 3) :])


@dataclass(frozen=True)
class Claim:
    """What is said of preference optimization, and the number that is above 0 where it holds.

    Attributes:
        text: the claim.
        source: who says so, with the version of the text.
        number: how it is measured.
        figure: the plot that shows it.
        measure: the number of each seed, (..., seeds), from curves (..., seeds, checkpoints); NaN where it is not
            defined.
        note: what to know beside the verdict.
        confirmatory: True: fixed before the runs, and given a verdict. False: looked at, without one.
    """

    text: str
    source: str
    number: str
    figure: str
    measure: Callable[[Curves], ndarray]
    note: str = ""
    confirmatory: bool = True


@dataclass(frozen=True)
class Finding:
    """A claim with its number in every seed.

    Attributes:
        claim: what is judged.
        values: of each seed.
        estimate: the mean and the size of the effect, with intervals.
        p: of Student's t test that the mean is 0; NaN where a seed has no number, or for a single seed.
        p_holm: corrected for all confirmatory claims; NaN likewise, and for what is exploratory.
        verdict: ``supported`` or ``contradicted``, by the sign of the mean, where ``p_holm`` is at most 5 %; else ``not
            shown``. ``not measured`` where a seed has no number, ``too few seeds`` below three, ``smoke run`` where
            the runs only show that everything works, ``exploratory`` for what is no confirmatory claim.
    """

    claim: Claim
    values: tuple[float, ...]
    estimate: Estimate
    p: float
    p_holm: float
    verdict: str

    @property
    def text(self) -> str:
        """The mean and its interval, or why there is none."""
        return written(self.values) if math.isnan(self.estimate.mean) else self.estimate.text

    @property
    def chance(self) -> str:
        """p after Holm, or a dash."""
        if math.isnan(self.p_holm):
            return "-"
        return "< 0.0001" if self.p_holm < 1e-4 else f"{self.p_holm:.2g}"


def judge(curves: Curves, claims: Sequence[Claim], smoke: bool = False) -> list[Finding]:
    """What the runs say to each claim; ``smoke``: they are too small to say anything."""
    values = numpy.array([_measured(claim, curves) for claim in claims])
    tested = [claim.confirmatory for claim in claims]
    found = []
    for claim, one, (p, p_holm, said) in zip(claims, values, decide(values, tested), strict=True):
        numbers = tuple(one.tolist())
        said = "smoke run" if smoke and claim.confirmatory else said
        found.append(Finding(claim, numbers, Estimate.of(numbers), p, p_holm, said))
    return found


def decide(values: ndarray, tested: Sequence[bool]) -> list[tuple[float, float, str]]:
    """p, p after Holm and the verdict, as in ``Finding``, of each claim.

    Args:
        values: (claims, seeds), the number of each claim in each seed.
        tested: of each claim, whether it is confirmatory.
    """
    p = two_sided_p(values).tolist()
    rows = [index for index, one in enumerate(tested) if one]
    corrected = dict(zip(rows, holm([p[index] for index in rows]), strict=True))
    found = []
    for index, one in enumerate(values):
        p_holm = corrected.get(index, math.nan)
        found.append((p[index], p_holm, _verdict(one, p_holm) if index in corrected else "exploratory"))
    return found


def _verdict(values: ndarray, p_holm: float) -> str:
    if not numpy.isfinite(values).all():
        return "not measured"
    if values.shape[-1] < FEWEST_SEEDS:
        return "too few seeds"
    if p_holm > LEVEL:
        return "not shown"
    return "supported" if values.mean() > 0 else "contradicted"


def _measured(claim: Claim, curves: Curves) -> ndarray:
    try:
        return numpy.asarray(claim.measure(curves), dtype=float)
    # a study may lack an arm, or a metric
    except KeyError:
        return numpy.full(len(curves.seeds), math.nan)
