"""The claims that a study tests, fixed before its runs, and the numbers that it looks at besides.

The paper is "What Is Preference Optimization Doing, How and Why?" (arXiv 2512.00778). Its second version drops some of
what the abstract of the first one says, so each claim names the versions that have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
from numpy import ndarray

from fused_po.study.claims import Claim, Curves, late, mean_of, way

__all__ = ["CLAIMS", "CONFIRMATORY", "EXPLORATORY", "first_at"]

Measure = Callable[[Curves], ndarray]

BOTH, FIRST = "arXiv 2512.00778, v1 and v2", "arXiv 2512.00778, v1; not in the abstract of v2"
REVIEW = "a public review of arXiv 2512.00778 v1"


def _balance(curves: Curves, negative: str, positive: str, method: str = "dpo") -> ndarray:
    n, p = (numpy.abs(late(curves, method, name)) for name in (negative, positive))
    with numpy.errstate(invalid="ignore", divide="ignore"):
        found: ndarray = (n - p) / (n + p)
    return found


def _between(method: str, metric: str, first: str, second: str) -> Measure:
    return lambda curves: late(curves, method, metric, first) - late(curves, method, metric, second)


def _median(curves: Curves, method: str, metric: str) -> ndarray:
    """Over what is defined of a curve; NaN where nothing is."""
    values = curves.array(method, metric)
    nothing = numpy.isnan(values).all(-1)
    found = numpy.nanmedian(numpy.where(nothing[..., None], 0.0, values), axis=-1)
    return numpy.where(nothing, math.nan, found)


def _at_equal_fit(metric: str, first: str, second: str) -> Measure:
    """The mean difference of a metric between two arms of DPO where its loss on training pairs is as low in both: over
    what both have reached, each arm at the first time that it was there.

    At equal margins instead, the arm whose margins spread more has the larger loss on training pairs too, and that is
    no overfitting.
    """

    def measure(curves: Curves) -> ndarray:
        of = [
            [-curves.array("dpo", "dpo_loss/train", arm), curves.array("dpo", metric, arm)] for arm in (first, second)
        ]
        shape = of[0][0].shape
        rows = zip(*(one.reshape(-1, shape[-1]) for arm in of for one in arm), strict=True)
        return numpy.array([_difference(*row) for row in rows]).reshape(shape[:-1])

    return measure


def _difference(x: ndarray, y: ndarray, others: ndarray, z: ndarray) -> float:
    ends = min(x.max(), others.max())
    begin = max(x[0], others[0])
    if not ends > begin or numpy.isnan([x, y, others, z]).any():
        return math.nan
    grid = numpy.linspace(begin, ends, 21)[1:]
    return float(numpy.mean(first_at(grid, x, y) - first_at(grid, others, z)))


def first_at(grid: ndarray, x: ndarray, y: ndarray) -> ndarray:
    """y where x has first come to each point of a grid, in straight lines between the records of x."""
    new = numpy.concatenate([[True], x[1:] > numpy.maximum.accumulate(x)[:-1]])
    return numpy.interp(grid, x[new], y[new])


def _named(curves: Curves, method: str, start: str) -> list[str]:
    found = [name for name in curves.metrics(method) if name.startswith(start)]
    if not found:
        raise KeyError(start)
    return found


def _later(curves: Curves, method: str) -> ndarray:
    """The mean cosine between a checkpoint's update and answers of every later checkpoint but the last."""
    names = _named(curves, method, "time/")
    steps = curves.steps(method, names[0])
    cells = [
        curves.array(method, f"time/{after}")[..., index]
        for index, step in enumerate(steps)
        for after in steps[:-1]
        if after > step > steps[0]
    ]
    return mean_of(numpy.stack(cells, -1))


def _thirds(method: str, side: str) -> Measure:
    """G of the top third less that of the bottom one, every token weighing the same, over their sizes."""

    def measure(curves: Curves) -> ndarray:
        top, bottom = (
            curves.array(method, f"G/{side}/{third}/no_reweighting")[..., 1:-1] for third in ("top", "bottom")
        )
        sizes = mean_of(numpy.abs(top)) + mean_of(numpy.abs(bottom))
        with numpy.errstate(invalid="ignore", divide="ignore"):
            found: ndarray = (mean_of(top) - mean_of(bottom)) / sizes
        return found

    return measure


def _spread(curves: Curves, method: str) -> ndarray:
    """The standard deviation of G between draws of D' over its mean size, both over the way."""
    stacked = numpy.stack([curves.array(method, name)[..., 1:-1] for name in _named(curves, method, "G/final ")])
    size: ndarray = mean_of(stacked.std(0, ddof=1)) / mean_of(numpy.abs(stacked.mean(0)))
    return size


def _greedy(curves: Curves, method: str) -> ndarray:
    """How much further steps lead towards greedy final answers than towards sampled ones."""
    return way(curves, method, "cosine/greedy") - way(curves, method, "cosine/sampled")


def _of(function: Callable[[Curves, str], ndarray], method: str) -> Measure:
    return lambda curves: function(curves, method)


CONFIRMATORY = (
    Claim(
        "DPO follows stable targets: its steps lead towards the final answers.",
        BOTH,
        "mean cosine of DPO's gradient and that of the final answers, between start and end",
        "cosine",
        lambda curves: way(curves, "dpo", "cosine"),
    ),
    Claim(
        "PPO's targets move: successive updates agree less than DPO's.",
        FIRST,
        "median cosine of the gradients of successive checkpoints, corrected for the drawing of D, DPO less PPO",
        "successive",
        lambda curves: _median(curves, "dpo", "successive") - _median(curves, "ppo", "successive"),
    ),
    Claim(
        "In DPO positive and negative learning offset each other.",
        FIRST,
        "minus the mean cosine of their gradients",
        "offset",
        lambda curves: -way(curves, "dpo", "offset_cosine"),
    ),
    Claim(
        "They do so less in PPO.",
        "derived from the claim above",
        "mean cosine of their gradients, PPO less DPO",
        "offset",
        lambda curves: way(curves, "ppo", "offset_cosine") - way(curves, "dpo", "offset_cosine"),
    ),
    Claim(
        "In DPO negative learning dominates later, by the size of its gradient.",
        REVIEW,
        "(negative - positive) / (negative + positive) of the gradient norms, last third of the run",
        "offset",
        lambda curves: _balance(curves, "offset_norms/negative", "offset_norms/positive"),
    ),
    Claim(
        "In DPO negative learning dominates later, by what it does for the final answers.",
        REVIEW,
        "(negative - positive) / (negative + positive) of the sizes of normalised G, last third of the run",
        "sides",
        lambda curves: _balance(curves, "cosine/negative", "cosine/positive"),
    ),
    Claim(
        "In PPO negative learning does not determine the targets: positive learning leads further to final answers.",
        BOTH,
        "mean normalised G of PPO's positive part less that of its negative part, between start and end",
        "sides",
        lambda curves: way(curves, "ppo", "cosine/positive") - way(curves, "ppo", "cosine/negative"),
    ),
    Claim(
        "In PPO negative learning supports exploration.",
        BOTH,
        "entropy per token (nats) on held-out prompts, with negative learning less without it, last third of the run",
        "arms_ppo",
        _between("ppo", "entropy/held_out", "full", "no negative"),
    ),
    Claim(
        "DPO's reweighting holds the policy back.",
        BOTH,
        "KL to the start (nats an answer) on held-out prompts, without reweighting less with it, last third of the run",
        "arms_dpo",
        _between("dpo", "kl/held_out", "no reweighting", "full"),
    ),
    Claim(
        "DPO's reweighting prevents overfitting.",
        BOTH,
        "DPO's loss on held-out pairs (nats) at equal loss on training pairs, without reweighting less with it",
        "overfitting",
        _at_equal_fit("dpo_loss/held_out", "no reweighting", "full"),
    ),
    Claim(
        "Positive learning prevents DPO's collapse.",
        REVIEW,
        "held-out reward, with positive learning less without it, last third of the run",
        "arms_dpo",
        _between("dpo", "reward/held_out", "full", "no positive"),
    ),
    Claim(
        "A gradual shift from positive to negative learning improves DPO.",
        BOTH,
        "held-out reward, controlled less DPO, last third of the run",
        "arms_dpo",
        _between("dpo", "reward/held_out", "controlled", "full"),
        "The schedule's constants are ours, the paper's are not known.",
    ),
)


def _look(text: str, number: str, figure: str, measure: Measure, source: str = "-") -> Claim:
    return Claim(text, source, number, figure, measure, confirmatory=False)


EXPLORATORY = (
    _look(
        "PPO's steps lead towards its final answers.",
        "mean cosine of PPO's gradient and that of the final answers",
        "cosine",
        lambda curves: way(curves, "ppo", "cosine"),
    ),
    *(
        _look(
            f"{method.upper()}: greedy final answers are led to more than sampled ones.",
            "mean cosine towards greedy less that towards sampled final answers",
            "cosine",
            _of(_greedy, method),
        )
        for method in ("dpo", "ppo")
    ),
    *(
        _look(
            f"{method.upper()}: how much G depends on which final answers were drawn.",
            "standard deviation of G between draws of D' over the mean size of G, which is never below 0",
            "g",
            _of(_spread, method),
        )
        for method in ("dpo", "ppo")
    ),
    *(
        _look(
            f"{method.upper()}: steps lead towards answers of every later checkpoint.",
            "mean cosine of a checkpoint's gradient and that of answers of later checkpoints",
            "time",
            _of(_later, method),
        )
        for method in ("dpo", "ppo")
    ),
    *(
        _look(
            f"{method.upper()}, {side} tokens: those that weigh more lead further to the final answers.",
            "G of the top third of the side less that of the bottom third, all weighing the same, over their sizes",
            "thirds",
            _thirds(method, side),
            FIRST,
        )
        for method in ("dpo", "ppo")
        for side in ("positive", "negative")
    ),
    _look(
        "DPO's reweighting prevents overfitting, by accuracy.",
        "accuracy on held-out pairs at equal loss on training pairs, with reweighting less without it",
        "overfitting",
        _at_equal_fit("accuracy/held_out", "full", "no reweighting"),
        BOTH,
    ),
    _look(
        "Less negative learning towards the end improves PPO.",
        "held-out reward, controlled less PPO, last third of the run",
        "arms_ppo",
        _between("ppo", "reward/held_out", "controlled", "full"),
        "the schedule is ours",
    ),
    _look(
        "No negative learning at all does better than a shift towards it.",
        "held-out reward of DPO, no negative less controlled, last third of the run",
        "arms_dpo",
        _between("dpo", "reward/held_out", "no negative", "controlled"),
    ),
    _look(
        "A KL penalty keeps PPO's entropy up.",
        "entropy per token (nats) on held-out prompts, with the penalty less without it, last third of the run",
        "arms_ppo",
        _between("ppo", "entropy/held_out", "KL penalty", "full"),
    ),
    _look(
        "Learning from negative advantages alone keeps more prompts solvable than from positive ones alone.",
        "pass@8 on held-out prompts, PPO without positive less PPO without negative, last third of the run",
        "passes",
        _between("ppo", "pass@8/held_out", "no positive", "no negative"),
        "arXiv 2506.01347",
    ),
    _look(
        "DPO lowers right answers too.",
        "minus the change of the log-prob (nats) of held-out right answers, last third of the run",
        "drift",
        lambda curves: -late(curves, "dpo", "drift/chosen"),
        "arXiv 2407.10490",
    ),
    _look(
        "So it does the same answers said otherwise.",
        "minus the change of the log-prob (nats) of right answers with their terms the other way around",
        "drift",
        lambda curves: -late(curves, "dpo", "drift/chosen/reworded"),
        "arXiv 2407.10490",
    ),
    _look(
        "DPO gathers mass on the likeliest token at wrong answers.",
        "largest probability at the tokens of wrong answers, last third of the run less the start",
        "drift",
        lambda curves: late(curves, "dpo", "max_prob/rejected") - curves.array("dpo", "max_prob/rejected")[..., 0],
        "arXiv 2407.10490",
    ),
    _look(
        "DPO's gradients are entangled: unlearning lowers right answers by more than learning raises them.",
        "minus the inner product of both gradients over the square of the positive one, less 1, last third",
        "offset",
        lambda curves: late(curves, "dpo", "entanglement") - 1.0,
        "arXiv 2410.13828",
    ),
    _look(
        "In PPO advantages are larger where tokens are likelier, which lowers entropy.",
        "covariance of log-prob (nats) and advantage over tokens, mean between start and end",
        "mechanism",
        lambda curves: way(curves, "ppo", "covariance"),
        "arXiv 2505.22617",
    ),
)

CLAIMS = (*CONFIRMATORY, *EXPLORATORY)
