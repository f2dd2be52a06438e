"""The plots of a study on a pretrained model: what the paper is known to plot, G over training and the ablations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fused_po.study.claims import Curves
from fused_po.study.figures import Figure
from fused_po.study.moment import SIDES, THIRDS
from fused_po.study.panels import Lines, band, frame, grid, legend
from fused_po.study.real_settings import NAMES
from fused_po.study.run import Results

__all__ = ["Rates", "real_figures"]

# label of the axis, by metric
_PANELS = {
    "win_rate/held_out": "win rate against the start",
    "reward/held_out": "reward of answers",
    "accuracy/held_out": "reward accuracy, held-out pairs",
    "dpo_loss/held_out": "DPO's loss, held-out pairs",
    "kl/held_out": "KL to start (nats per answer)",
    "entropy/held_out": "entropy per token (nats)",
}

Rates = Mapping[tuple[str, str], tuple[float, float, float]]


def real_figures(rates: Rates) -> dict[str, Figure]:
    """The plots by name.

    Args:
        rates: (method, arm) -> the final win rate and the ends of its interval.
    """
    lines: dict[str | tuple[str, str], str] = {f"G/{side}": side for side in SIDES}
    thirds: list[tuple[str, Lines]] = [
        (f"G, {side}{label}", {f"G/{side}/{third}{suffix}": f"{third} third" for third in THIRDS})
        for side in SIDES
        for label, suffix in (("", ""), (", equal weights", "/no_reweighting"))
    ]
    found = {
        "g": Figure(
            "G over training",
            "Whether a step on the loss makes the answers of the final model likelier: above 0 it does (nats per unit "
            "of step). It has no normaliser: compare signs and shapes, not sizes between methods.",
            _grid([("G", {"G": "whole loss"})], zero=True),
        ),
        "cosine": Figure(
            "Normalised G over training",
            "The cosine between the gradient of the loss and that of the final model's answers (negated "
            "log-likelihood), and what the sides add to it.",
            _grid(
                [("cosine", {"cosine/positive": "positive", "cosine/negative": "negative", "cosine": "whole"})],
                zero=True,
            ),
        ),
        "sides": Figure(
            "G by side",
            "Positive learning (from chosen answers, or positive advantages) and negative learning sum to the whole.",
            _grid([("G", {**lines, "G": "whole"})], zero=True),
        ),
        "thirds": Figure(
            "G by weight third within a side",
            "Thirds of a side by the loss's own weight: sigmoid(-beta h) of DPO's pairs, |A| of a policy's tokens. "
            "With their own weights, and with the mean weight for all.",
            _grid(thirds, zero=True),
        ),
        "win_rates": Figure(
            "Win rates",
            "Of the final models against the start, over held-out prompts; bars are 95 % bootstrap intervals.",
            lambda canvas, curves, results: _rates(canvas, rates),
        ),
        "drift": Figure(
            "What becomes of chosen and rejected answers",
            "Of held-out pairs: the change of their log-prob since the start, and the largest probability of any token "
            "at their positions.",
            _grid(
                [
                    ("change of log-prob (nats)", {"drift/chosen": "chosen", "drift/rejected": "rejected"}),
                    ("largest probability", {"max_prob/chosen": "chosen", "max_prob/rejected": "rejected"}),
                ]
            ),
        ),
    }
    for method, name in NAMES.items():
        found[f"arms_{method}"] = Figure(
            f"{name} without one component each",
            "The same start trained without negative learning, without positive learning, without reweighting, and by "
            "the controlled schedule, whose constants are ours.",
            _arms(method),
        )
    return found


def _grid(panels: list[tuple[str, Lines]], zero: bool = False) -> Callable[[Any, Curves, Results], None]:
    return lambda canvas, curves, results: grid(canvas, curves, panels, zero)


def _arms(method: str) -> Callable[[Any, Curves, Results], None]:
    def paint(canvas: Any, curves: Curves, results: Results) -> None:
        arms = [arm for own, arm in curves.runs() if own == method]
        shown = {m: label for m, label in _PANELS.items() if any(m in curves.metrics(method, arm) for arm in arms)}
        if not shown:
            raise KeyError(method)
        columns = 3
        rows = -(-len(shown) // columns)
        canvas.set_size_inches(3.1 * columns + 1.2, 2.6 * rows)
        axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
        for axis, (metric, label) in zip(axes, shown.items(), strict=False):
            for number, arm in enumerate(arms):
                if metric in curves.metrics(method, arm):
                    name = NAMES[method] if arm == "full" else arm
                    values = curves.array(method, metric, arm)
                    band(axis, curves.steps(method, metric, arm), values, name, number)
            frame(axis, "", label)
            if metric.startswith(("kl", "dpo_loss")):
                # an arm that collapses would flatten the others
                axis.set_yscale("symlog", linthresh=1.0)
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        legend(axes[columns - 1])

    return paint


def _rates(canvas: Any, rates: Rates) -> None:
    if not rates:
        raise KeyError("win_rate")
    canvas.set_size_inches(7.0, 0.34 * len(rates) + 0.9)
    axis = canvas.subplots()
    for place, (mean, low, high) in enumerate(reversed(list(rates.values()))):
        axis.plot([low, high], [place, place], color="C0", linewidth=1.5)
        axis.plot([mean], [place], "o", color="C0", markersize=4)
    names = [f"{NAMES[method]}, {arm}" for method, arm in reversed(list(rates))]
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    frame(axis, "", "", xlabel="win rate against the start")
    axis.axvline(0.5, color="black", linewidth=0.8)
