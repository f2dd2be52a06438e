"""The plots of a study: lines are means over seeds, bands their standard error, thin lines single seeds."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fused_po.pictures import png
from fused_po.study.claims import Curves
from fused_po.study.estimates import mean_and_error
from fused_po.study.run import Results
from fused_po.study.settings import ARMS, METHODS

__all__ = ["FIGURES", "Figure", "draw"]

NAMES = {"dpo": "DPO", "ppo": "PPO"}
THIRDS = {"top": "top third", "middle": "middle", "bottom": "bottom"}
WIDTH, HEIGHT = 4.4, 3.1


@dataclass(frozen=True)
class Figure:
    """A plot: ``paint(axes, curves, results)`` fills axes of ``rows`` x ``columns``."""

    title: str
    caption: str
    rows: int
    columns: int
    paint: Callable[[Any, Curves, Results], None]


def draw(figure: Figure, curves: Curves, results: Results) -> tuple[str, bytes]:
    """The plot as SVG, for a page that holds it, and as PNG, for one that links it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (WIDTH * figure.columns, HEIGHT * figure.rows)
    # names of elements follow from this, so that the same numbers give the same file
    with pyplot.rc_context({"svg.hashsalt": figure.title, "font.size": 8}):
        canvas, axes = pyplot.subplots(figure.rows, figure.columns, figsize=size, layout="constrained", squeeze=False)
        figure.paint(axes, curves, results)
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None})
        picture = png(canvas)
        pyplot.close(canvas)
    return text.getvalue(), picture


def _line(axis: Any, curves: Curves, method: str, metric: str, label: str, arm: str = "full") -> None:
    runs = [curves.curve(seed, method, metric, arm) for seed in curves.seeds]
    steps = list(runs[0])
    table = [[run[step] for run in runs] for step in steps]
    means, errors = zip(*map(mean_and_error, table), strict=True)
    (line,) = axis.plot(steps, means, label=label, linewidth=1.6)
    for run in runs if len(runs) > 1 else []:
        axis.plot(steps, list(run.values()), color=line.get_color(), linewidth=0.4, alpha=0.5)
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _frame(axis: Any, title: str, ylabel: str, zero: bool = False) -> None:
    axis.set_title(title)
    axis.set_xlabel("updates")
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    if zero:
        axis.axhline(0.0, color="black", linewidth=0.6)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _by_method(lines: dict[str, str], ylabel: str) -> Callable[[Any, Curves, Results], None]:
    """A panel for each method, a line for each metric."""

    def paint(axes: Any, curves: Curves, results: Results) -> None:
        for axis, method in zip(axes[0], METHODS, strict=True):
            for metric, label in lines.items():
                _line(axis, curves, method, metric, label)
            _frame(axis, NAMES[method], ylabel, zero=True)

    return paint


def _grid(panels: Sequence[tuple[str, dict[str, str]]], zero: bool = False) -> Callable[[Any, Curves, Results], None]:
    """A row for each method, a column for each panel: (label of the axis, metric -> label)."""

    def paint(axes: Any, curves: Curves, results: Results) -> None:
        for row, method in zip(axes, METHODS, strict=True):
            for axis, (ylabel, lines) in zip(row, panels, strict=True):
                for metric, label in lines.items():
                    _line(axis, curves, method, metric, label)
                _frame(axis, NAMES[method], ylabel, zero)

    return paint


def _arms(axes: Any, curves: Curves, results: Results) -> None:
    panels = {
        "reward/held_out": "held-out reward",
        "reward/gap": "training less held-out reward",
        "entropy/held_out": "entropy per token",
        "kl/held_out": "KL to start",
    }
    for row, method in zip(axes, METHODS, strict=True):
        for axis, (metric, ylabel) in zip(row, panels.items(), strict=True):
            for arm in ARMS[method]:
                _line(axis, curves, method, metric, NAMES[method] if arm == "full" else arm, arm)
            if metric.startswith("kl"):
                # a collapsed arm would flatten the others
                axis.set_yscale("symlog", linthresh=1.0)
            _frame(axis, NAMES[method], ylabel)


def _coefficients(axes: Any, curves: Curves, results: Results) -> None:
    seed = curves.seeds[0]
    for row, method in zip(axes, METHODS, strict=True):
        steps = sorted({one.step for one in results.bins if one.method == method})
        for axis, step in zip(row, (steps[0], steps[len(steps) // 2], steps[-1]), strict=True):
            for side in ("positive", "negative"):
                bars = [b for b in results.bins if (b.seed, b.method, b.step, b.side) == (seed, method, step, side)]
                edges = [*(bar.left for bar in bars), bars[-1].right]
                axis.stairs([bar.count for bar in bars], edges, fill=True, alpha=0.5, label=side)
            _frame(axis, f"{NAMES[method]}, update {step}", "tokens")
            axis.set_xlabel("k = -dL/dlogp")
            axis.set_yscale("symlog")


FIGURES = {
    "g": Figure(
        "G over training",
        "Whether a step on the loss makes the final model's answers likelier (G, nats per unit of step).",
        1,
        2,
        _by_method({"G": "whole loss"}, "G"),
    ),
    "sides": Figure(
        "G by part",
        "Positive and negative learning sum to the whole.",
        1,
        2,
        _by_method({"G/positive": "positive", "G/negative": "negative", "G/whole": "whole"}, "G"),
    ),
    "thirds": Figure(
        "G by weight group",
        "Thirds of answers by sigmoid(-beta h) for DPO, of tokens by |A| for PPO; with their own weights, by which the "
        "top third counts for more, and with the mean weight of the batch for all.",
        2,
        2,
        _grid(
            [
                ("G", {f"G/{third}": name for third, name in THIRDS.items()}),
                ("G, equal weights", {f"G/{third}/no_reweighting": name for third, name in THIRDS.items()}),
            ],
            zero=True,
        ),
    ),
    "flat": Figure(
        "G with and without reweighting",
        "Without it every weight is the mean weight of the batch.",
        1,
        2,
        _by_method({"G/whole": "with", "G/whole/no_reweighting": "without"}, "G"),
    ),
    "offset": Figure(
        "How far the sides offset each other",
        "Cosine between the gradients of positive and negative learning in all parameters, and their norms.",
        2,
        2,
        _grid(
            [
                ("cosine", {"offset_cosine": "positive, negative"}),
                ("gradient norm", {"offset_norms/positive": "positive", "offset_norms/negative": "negative"}),
            ]
        ),
    ),
    "arms": Figure(
        "Ablations",
        "The same start without one component each, and the controlled variant.",
        2,
        4,
        _arms,
    ),
    "drift": Figure(
        "Drift and squeezing",
        "Held-out right and wrong answers of the start: change of their log-prob, and the largest probability of any "
        "token at their positions.",
        2,
        2,
        _grid(
            [
                ("change of log-prob (nats)", {"drift/chosen": "right", "drift/rejected": "wrong"}),
                ("largest probability", {"max_prob/chosen": "right", "max_prob/rejected": "wrong"}),
            ]
        ),
    ),
    "coefficients": Figure(
        "Coefficients",
        "k per token at the first, a middle and the last checkpoint of one seed; above 0 a step raises the token.",
        2,
        3,
        _coefficients,
    ),
}
