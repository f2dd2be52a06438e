"""The paper's claims as numbers, and what the runs say to each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fused_po.study.estimates import fluctuation, mean_and_error, ratio, two_sided_p, written
from fused_po.study.run import Results

__all__ = ["CLAIMS", "FALSE_VERDICTS", "Claim", "Curves", "Finding", "judge"]

FEWEST_SEEDS = 3
# how often a claim gets a verdict where there is nothing, whatever the number of seeds
FALSE_VERDICTS = 0.05


class Curves:
    """The numbers of a study by run."""

    def __init__(self, results: Results) -> None:
        self._curves: dict[tuple[int, str, str, str], dict[int, float]] = {}
        for point in results.points:
            run = point.seed, point.method, point.arm, point.metric
            self._curves.setdefault(run, {})[point.step] = point.value
        self.seeds = sorted({point.seed for point in results.points})

    def curve(self, seed: int, method: str, metric: str, arm: str = "full") -> dict[int, float]:
        """step -> value."""
        return self._curves[seed, method, arm, metric]

    def on_the_way(self, seed: int, method: str, metric: str) -> list[float]:
        """Values between the start, common to all runs, and the final model."""
        return list(self.curve(seed, method, metric).values())[1:-1]

    def draws(self, seed: int, method: str) -> list[str]:
        """The metrics that are G of the whole loss over one draw of D each."""
        found = (name for one in self._curves if one[:3] == (seed, method, "full") for name in one[3:])
        return [name for name in found if name.startswith("G/draw ")]

    def late(self, seed: int, method: str, metric: str, arm: str = "full") -> float:
        """The mean over the last third of the checkpoints."""
        values = list(self.curve(seed, method, metric, arm).values())
        return statistics.fmean(values[-max(1, len(values) // 3) :])


@dataclass(frozen=True)
class Claim:
    """What is said of preference optimization, and the number that is above 0 where it holds.

    Attributes:
        text: the claim.
        source: who says so.
        number: how it is measured.
        figure: the plot that shows it.
        measure: the number of one seed; NaN where it is not defined.
        note: what to know beside the verdict.
    """

    text: str
    source: str
    number: str
    figure: str
    measure: Callable[[Curves, int], float]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A claim with its number in every seed.

    Attributes:
        claim: what is judged.
        values: of each seed.
        mean, error: over seeds, and the standard error of that mean; NaN for a single seed, or where a seed has no
            number.
        p: of Student's t test that the mean is 0; NaN likewise.
        verdict: ``supported`` or ``contradicted`` where all seeds agree in sign and p is at most ``FALSE_VERDICTS``;
            else ``not shown``. ``not measured`` where a seed has no number, ``too few seeds`` below three.
    """

    claim: Claim
    values: tuple[float, ...]
    mean: float
    error: float
    p: float
    verdict: str

    @property
    def text(self) -> str:
        """The mean and its error, or why there is none."""
        return written(self.values)

    @property
    def chance(self) -> str:
        """p, or a dash."""
        return "-" if math.isnan(self.p) else f"{self.p:.2g}"


def judge(curves: Curves, claims: Sequence[Claim] | None = None) -> list[Finding]:
    """What the runs say to each claim."""
    found = []
    for claim in CLAIMS if claims is None else claims:
        values = tuple(claim.measure(curves, seed) for seed in curves.seeds)
        mean, error = mean_and_error(values)
        p = two_sided_p(values)
        found.append(Finding(claim, values, mean, error, p, _verdict(values, p)))
    return found


def _verdict(values: Sequence[float], p: float) -> str:
    if not all(map(math.isfinite, values)):
        return "not measured"
    if len(values) < FEWEST_SEEDS:
        return "too few seeds"
    agree = all(value > 0 for value in values) or all(value < 0 for value in values)
    if not agree or p > FALSE_VERDICTS:
        return "not shown"
    return "supported" if values[0] > 0 else "contradicted"


def _fluctuation(curves: Curves, seed: int, method: str) -> float:
    times = list(curves.curve(seed, method, "G"))[1:-1]
    draws = zip(*(curves.on_the_way(seed, method, name) for name in curves.draws(seed, method)), strict=True)
    return fluctuation(times, list(draws))


def _steady(curves: Curves, seed: int) -> float:
    values = curves.on_the_way(seed, "dpo", "G")
    return ratio(min(values), statistics.fmean(map(abs, values)))


def _offset(curves: Curves, seed: int, method: str) -> float:
    return statistics.fmean(curves.on_the_way(seed, method, "offset_cosine"))


def _balance(curves: Curves, seed: int, negative: str, positive: str) -> float:
    n, p = (abs(curves.late(seed, "dpo", name)) for name in (negative, positive))
    return ratio(n - p, n + p)


def _between_arms(method: str, metric: str, first: str, second: str) -> Callable[[Curves, int], float]:
    return lambda curves, seed: curves.late(seed, method, metric, first) - curves.late(seed, method, metric, second)


def _groups_apart(curves: Curves, seed: int) -> float:
    """Whether tokens with a large |A| lead further to the final answers than those with a small one, all weighing the
    same: with their own weights the first would do so whatever the advantages are.
    """
    top, bottom = (curves.on_the_way(seed, "ppo", f"G/{third}/no_reweighting") for third in ("top", "bottom"))
    # signed sums: sizes of single values would count their error as G
    return ratio(sum(top) - sum(bottom), sum(map(abs, (*top, *bottom))))


PAPER = "arXiv 2512.00778"

CLAIMS = (
    Claim(
        "DPO follows stable targets: G stays above 0.",
        PAPER,
        "smallest G of the run over its mean size",
        "g",
        _steady,
    ),
    Claim(
        "PPO follows moving targets: its G fluctuates more than DPO's.",
        PAPER,
        "share of G's mean square that is neither level nor straight trend, redrawing D taken off, PPO less DPO",
        "g",
        lambda curves, seed: _fluctuation(curves, seed, "ppo") - _fluctuation(curves, seed, "dpo"),
    ),
    Claim(
        "In DPO positive and negative learning offset each other.",
        PAPER,
        "minus the mean cosine of their gradients",
        "offset",
        lambda curves, seed: -_offset(curves, seed, "dpo"),
    ),
    Claim(
        "They do so less in PPO.",
        "derived from the above",
        "mean cosine of their gradients, PPO less DPO",
        "offset",
        lambda curves, seed: _offset(curves, seed, "ppo") - _offset(curves, seed, "dpo"),
    ),
    Claim(
        "In DPO negative learning dominates later (size of the gradients).",
        PAPER,
        "(negative - positive) / (negative + positive) of the norms, last third of the run",
        "offset",
        lambda curves, seed: _balance(curves, seed, "offset_norms/negative", "offset_norms/positive"),
    ),
    Claim(
        "In DPO negative learning dominates later (what it does for the final answers).",
        PAPER,
        "(negative - positive) / (negative + positive) of the sizes of G, last third of the run",
        "sides",
        lambda curves, seed: _balance(curves, seed, "G/negative", "G/positive"),
    ),
    Claim(
        "DPO's reweighting holds the policy back.",
        PAPER,
        "KL to the start on held-out prompts, without reweighting less with it, last third of the run",
        "arms",
        _between_arms("dpo", "kl/held_out", "no reweighting", "full"),
    ),
    Claim(
        "DPO's reweighting prevents overfitting.",
        PAPER,
        "training less held-out reward, without reweighting less with it, last third of the run",
        "arms",
        _between_arms("dpo", "reward/gap", "no reweighting", "full"),
    ),
    Claim(
        "In PPO negative learning supports exploration.",
        PAPER,
        "entropy per token on held-out prompts, with negative learning less without it, last third of the run",
        "arms",
        _between_arms("ppo", "entropy/held_out", "full", "no negative"),
    ),
    Claim(
        "Weighing by |A| tells token groups apart in PPO.",
        PAPER,
        "G of the top third by |A| less that of the bottom third, every token weighing the same, over their sizes",
        "thirds",
        _groups_apart,
    ),
    Claim(
        "A gradual shift from positive to negative learning improves DPO.",
        PAPER,
        "held-out reward, controlled less DPO, last third of the run",
        "arms",
        _between_arms("dpo", "reward/held_out", "controlled", "full"),
        "The schedule was chosen on seeds 0 to 4, after one that ended with twice as much negative as positive weight "
        "had failed on them: only other seeds test it.",
    ),
    Claim(
        "Less negative learning towards the end improves PPO.",
        "the presets' constants are ours",
        "held-out reward, controlled less PPO, last third of the run",
        "arms",
        _between_arms("ppo", "reward/held_out", "controlled", "full"),
    ),
    Claim(
        "DPO lowers chosen answers too.",
        "arXiv 2407.10490",
        "minus the drift of the held-out right answers' log-prob, last third of the run",
        "drift",
        lambda curves, seed: -curves.late(seed, "dpo", "drift/chosen"),
    ),
)
