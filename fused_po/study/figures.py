"""The plots of a study."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from fused_po.pictures import png
from fused_po.study.claims import Curves, Finding, mean_of
from fused_po.study.moment import POSITIONS, SIDES, THIRDS
from fused_po.study.panels import NAMES, band, frame, grid, heat, legend, quartiles
from fused_po.study.paper import first_at
from fused_po.study.run import Results

__all__ = ["FIGURES", "Figure", "draw", "draw_findings"]

COLORS = {"supported": "#06752b", "contradicted": "#b3261e"}


@dataclass(frozen=True)
class Figure:
    """A plot: ``paint(canvas, curves, results)`` fills a matplotlib figure, or raises KeyError where its numbers were
    not measured.
    """

    title: str
    caption: str
    paint: Callable[[Any, Curves, Results], None]


def draw(figure: Figure, curves: Curves, results: Results) -> tuple[str, bytes] | None:
    """The plot as SVG, for a page that holds it, and as PNG, for one that links it; None where there is nothing to
    draw.
    """
    return _drawn(figure.title, lambda canvas: figure.paint(canvas, curves, results))


def draw_findings(findings: Sequence[Finding]) -> tuple[str, bytes]:
    """The effect size of every confirmatory claim with its interval."""
    drawn = _drawn("The claims", lambda canvas: _findings(canvas, findings))
    assert drawn is not None
    return drawn


def _drawn(title: str, paint: Callable[[Any], None]) -> tuple[str, bytes] | None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # names of elements follow from this, so that the same numbers give the same file
    with pyplot.rc_context({"svg.hashsalt": title, "font.size": 8}):
        canvas = pyplot.figure(layout="constrained")
        try:
            paint(canvas)
            text = io.StringIO()
            canvas.savefig(text, format="svg", metadata={"Date": None})
            return text.getvalue(), png(canvas, colours=128)
        except KeyError:
            return None
        finally:
            pyplot.close(canvas)


def _findings(canvas: Any, findings: Sequence[Finding]) -> None:
    shown = [one for one in findings if one.claim.confirmatory][::-1]
    canvas.set_size_inches(10.5, 0.3 * len(shown) + 0.8)
    axis = canvas.subplots()
    for place, one in enumerate(shown):
        color = COLORS.get(one.verdict, "#666666")
        axis.plot([one.estimate.d_low, one.estimate.d_high], [place, place], color=color, linewidth=1.5)
        axis.plot([one.estimate.d], [place], "o", color=color, markersize=4)
    axis.set_yticks(range(len(shown)), [f"{one.claim.text} ({one.verdict})" for one in shown], fontsize=7)
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    axis.set_xscale("symlog", linthresh=1.0)
    frame(axis, "", "", xlabel="effect size (Hedges' g), with the 95 % interval of each for itself")
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()
    ends = [end for one in shown for end in (one.estimate.d_low, one.estimate.d_high) if not math.isnan(end)]
    axis.set_xlim(min([-1.5, *ends]) * 1.3, max([1.5, *ends]) * 1.3)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.axvline(0.0, color="black", linewidth=0.8)


def _by_method(ylabel: str, lines: dict[str, str]) -> Callable[[Any, Curves, Results], None]:
    return lambda canvas, curves, results: grid(canvas, curves, [(ylabel, lines)], zero=True)


def _grid(panels: Sequence[tuple[str, dict[str, str]]], zero: bool = False) -> Callable[[Any, Curves, Results], None]:
    return lambda canvas, curves, results: grid(canvas, curves, panels, zero)


ARM_PANELS = {
    "reward/held_out": "held-out reward",
    "reward/gap": "training less held-out reward",
    "entropy/held_out": "entropy per token (nats)",
    "kl/held_out": "KL to start (nats per answer)",
}


def _arms(method: str) -> Callable[[Any, Curves, Results], None]:
    def paint(canvas: Any, curves: Curves, results: Results) -> None:
        arms = [arm for own, arm in curves.runs() if own == method]
        if not arms:
            raise KeyError(method)
        canvas.set_size_inches(8.6, 5.2)
        axes = canvas.subplots(2, 2)
        for axis, (metric, ylabel) in zip(axes.flat, ARM_PANELS.items(), strict=True):
            for number, arm in enumerate(arms):
                label = NAMES.get(method, method) if arm == "full" else arm
                band(axis, curves.steps(method, metric, arm), curves.array(method, metric, arm), label, number, 0.1)
            frame(axis, NAMES.get(method, method), ylabel)
            if metric.startswith("kl"):
                # a collapsed arm would flatten the others
                axis.set_yscale("symlog", linthresh=1.0)
        legend(axes[0, 1])

    return paint


def _passes(canvas: Any, curves: Curves, results: Results) -> None:
    arms = list(dict.fromkeys(arm for _, arm in curves.runs()))
    lines = {("pass@8/held_out", arm): arm for arm in arms}
    grid(canvas, curves, [("pass@8, held-out prompts", lines)])


def _overfitting(canvas: Any, curves: Curves, results: Results) -> None:
    arms = {"full": "DPO", "no reweighting": "no reweighting", "controlled": "controlled"}
    canvas.set_size_inches(8.6, 2.9)
    panels = {"dpo_loss/held_out": "loss on held-out pairs (nats)", "accuracy/held_out": "accuracy on held-out pairs"}
    axes = canvas.subplots(1, 2)
    for axis, (metric, ylabel) in zip(axes, panels.items(), strict=True):
        for number, (arm, label) in enumerate(arms.items()):
            x, y = -curves.array("dpo", "dpo_loss/train", arm), curves.array("dpo", metric, arm)
            points = numpy.linspace(float(numpy.nanmax(x[:, 0])), float(numpy.nanmedian(x.max(-1))), 25)
            rows = [
                numpy.where(points <= own.max(), first_at(points, own, other), numpy.nan)
                for own, other in zip(x, y, strict=True)
            ]
            band(axis, -points, numpy.array(rows), label, number, 0.1)
        frame(axis, "DPO", ylabel, xlabel="loss on training pairs (nats)")
        axis.invert_xaxis()
    legend(axes[1])


def _methods(curves: Curves, metric: str) -> list[str]:
    found = [m for m in dict.fromkeys(m for m, _ in curves.runs()) if any(metric in n for n in curves.metrics(m))]
    if not found:
        raise KeyError(metric)
    return found


def _time(canvas: Any, curves: Curves, results: Results) -> None:
    methods = _methods(curves, "time/")
    canvas.set_size_inches(4.4 * len(methods), 3.4)
    axes = canvas.subplots(1, len(methods), squeeze=False)[0]
    for axis, method in zip(axes, methods, strict=True):
        names = [name for name in curves.metrics(method) if name.startswith("time/")]
        table = numpy.array([quartiles(curves.array(method, name))[1] for name in names])  # answers, models
        image = heat(axis, table, curves.steps(method, names[0]), [name.removeprefix("time/") for name in names], False)
        axis.invert_yaxis()
        axis.set_title(NAMES.get(method, method))
        axis.set_xlabel("model after this many updates")
        axis.set_ylabel("answers of the model after")
        canvas.colorbar(image, ax=axis, label="cosine")


def _table(canvas: Any, curves: Curves, results: Results) -> None:
    methods = _methods(curves, "table/")
    canvas.set_size_inches(3.9 * len(methods) + 0.6, 2.9)
    axes = canvas.subplots(1, len(methods), squeeze=False)[0]
    rows = [(side, third) for side in SIDES for third in THIRDS]
    for axis, method in zip(axes, methods, strict=True):
        cells = numpy.stack(
            [
                [mean_of(curves.array(method, f"table/{side}/{third}/{place}")[..., 1:-1]) for place in POSITIONS]
                for side, third in rows
            ]
        )  # (6, 3, seeds)
        shares = cells / numpy.abs(cells).sum((0, 1), keepdims=True)
        heat(axis, quartiles(numpy.moveaxis(shares, -1, 0))[1], POSITIONS, [" ".join(row) for row in rows], True)
        axis.set_title(NAMES.get(method, method))
        axis.set_xlabel("third of the answer")


def _coefficients(canvas: Any, curves: Curves, results: Results) -> None:
    methods = list(dict.fromkeys(one.method for one in results.bins))
    if not methods:
        raise KeyError("coefficients")
    canvas.set_size_inches(9.6, 2.5 * len(methods))
    axes = canvas.subplots(len(methods), 3, squeeze=False)
    for row, method in zip(axes, methods, strict=True):
        own = [one for one in results.bins if one.method == method]
        steps = sorted({one.step for one in own})
        for axis, step in zip(row, (steps[0], steps[len(steps) // 2], steps[-1]), strict=True):
            at = [one for one in own if one.step == step]
            total = sum(one.count for one in at) or 1.0
            for side in SIDES:
                heights: dict[tuple[float, float], float] = {}
                for bar in (one for one in at if one.side == side):
                    heights[bar.left, bar.right] = heights.get((bar.left, bar.right), 0.0) + bar.count / total
                # bars of several seeds share their edges
                for (left, right), height in heights.items():
                    axis.bar(left, height, right - left, align="edge", color="C0" if side == "positive" else "C3")
            frame(axis, f"{NAMES.get(method, method)}, update {step}", "share of tokens", xlabel="k")
            axis.axvline(0.0, color="black", linewidth=0.6)
            axis.set_yscale("log")
            axis.set_ylim(1e-4, 1.0)


FIGURES = {
    "cosine": Figure(
        "Normalised G over training",
        "Cosine between the gradient of the loss and that of the final model's answers (negated log-likelihood): above "
        "0 a step makes them likelier. Towards answers as they are sampled, towards greedy ones, and the mean of both, "
        "which is what the claims are tested by. At the last checkpoint sampled answers have a G of about 0 by "
        "construction: the mean score of a model on its own samples is 0.",
        _by_method("cosine", {"cosine": "mean of both", "cosine/sampled": "sampled", "cosine/greedy": "greedy"}),
    ),
    "g": Figure(
        "G as the paper defines it",
        "The inner product itself, in nats per unit of step. It has no normaliser: as gradients grow, so does it.",
        _by_method("G", {"G": "mean of both", "G/sampled": "sampled", "G/greedy": "greedy"}),
    ),
    "successive": Figure(
        "Do successive updates agree?",
        "Cosine between the gradients of the loss at successive checkpoints. PPO draws D anew each time, which alone "
        "lowers the cosine; corrected for it by products of independent draws. DPO's D are all its pairs.",
        _by_method("cosine", {"successive": "corrected", "successive/uncorrected": "as drawn"}),
    ),
    "time": Figure(
        "Moving targets, seen directly",
        "Cosine between the gradient of the loss at one checkpoint (across) and that of answers sampled from the model "
        "of another one (up). Red: a step makes these answers likelier. Stable targets make the upper left triangle "
        "red: each step leads towards the answers of all later checkpoints. Medians over seeds.",
        _time,
    ),
    "sides": Figure(
        "Normalised G of both sides",
        "G of positive and of negative learning on the scale of the whole, whose sum they are.",
        _by_method("cosine", {"cosine/positive": "positive", "cosine/negative": "negative", "cosine": "whole"}),
    ),
    "thirds": Figure(
        "G by weight within a side",
        "Thirds of the answers of a side by sigmoid(-beta h) for DPO, of its tokens by |A| for PPO; every token with "
        "the mean weight of the batch, so that the top third counts for no more than the others. Not defined where all "
        "weights of a side are alike, as in DPO at the start.",
        _grid(
            [
                (f"G, {side}, equal weights", {f"G/{side}/{third}/no_reweighting": third for third in THIRDS})
                for side in SIDES
            ],
            zero=True,
        ),
    ),
    "table": Figure(
        "G by side, weight and position",
        "Shares of G, with the loss's own weights, between start and end: rows are sides and thirds by weight within "
        "them, columns thirds of the answer's tokens. The sizes of all cells sum to 1. Medians over seeds.",
        _table,
    ),
    "offset": Figure(
        "How the gradients of both sides lie to each other",
        "Their cosine in all parameters, -1 where they offset each other entirely; their norms; and their "
        "entanglement: above 1, unlearning the negative side lowers the positive one by more than learning raises it.",
        _grid(
            [
                ("cosine", {"offset_cosine": "positive, negative"}),
                ("gradient norm", {"offset_norms/positive": "positive", "offset_norms/negative": "negative"}),
                ("entanglement", {"entanglement": "entanglement"}),
            ]
        ),
    ),
    "overfitting": Figure(
        "Overfitting at equal training loss",
        "DPO's loss and accuracy on held-out pairs of the start, against how far the loss on training pairs has come "
        "down: arms that merely learned more or less lie on one line.",
        _overfitting,
    ),
    "arms_dpo": Figure(
        "Ablations of DPO",
        "The same start without one component each, and the controlled variant.",
        _arms("dpo"),
    ),
    "arms_ppo": Figure(
        "Ablations of PPO",
        "The same start without one component each, the controlled variant, and a penalty on the KL to the start.",
        _arms("ppo"),
    ),
    "passes": Figure(
        "Solvable prompts",
        "Share of held-out prompts that at least one of eight answers solves. PPO without negative learning reinforces "
        "right answers only (PSR), without positive learning wrong ones only (NSR).",
        _passes,
    ),
    "drift": Figure(
        "Drift and squeezing",
        "Held-out right and wrong answers of the start, as they were given and said otherwise (terms the other way "
        "around): change of their log-prob, and the largest probability of any token at their positions.",
        _grid(
            [
                (
                    "change of log-prob (nats)",
                    {
                        f"drift/{side}{suffix}": f"{name}{note}"
                        for side, name in (("chosen", "right"), ("rejected", "wrong"))
                        for suffix, note in (("", ""), ("/reworded", ", reworded"))
                    },
                ),
                ("largest probability", {"max_prob/chosen": "right", "max_prob/rejected": "wrong"}),
            ]
        ),
    ),
    "mechanism": Figure(
        "Log-probs and advantages",
        "Covariance of log-prob and advantage over the tokens of D: above 0, updates make likely tokens likelier, and "
        "entropy falls.",
        _by_method("covariance", {"covariance": "covariance"}),
    ),
    "coefficients": Figure(
        "Coefficients",
        "k = -dL/dlogp of a token, in units of one pair for DPO and one token for PPO, over all seeds, at the first, "
        "a middle and the last checkpoint: above 0 (blue, positive side) a step raises the token, below 0 (red, "
        "negative side) it lowers it.",
        _coefficients,
    ),
}
