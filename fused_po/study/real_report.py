"""The report of a study on a pretrained model: one sentence, a table, plots and claims, as HTML and Markdown."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy

import fused_po
from fused_po.study.claims import Claim, Curves, Finding, judge
from fused_po.study.estimates import Estimate
from fused_po.study.figures import draw
from fused_po.study.page import Page
from fused_po.study.paper import CLAIMS
from fused_po.study.real_figures import Rates, real_figures
from fused_po.study.real_measure import interval
from fused_po.study.real_pool import Pool
from fused_po.study.real_settings import NAMES, REAL_METHODS, RealSettings
from fused_po.study.run import Point, Results

__all__ = ["write_real_report"]

ABOUT = (
    '"What Is Preference Optimization Doing, How and Why?" (arXiv 2512.00778) takes preference optimization apart into '
    "positive learning, negative learning and loss reweighting, and watches each by G: whether a step on it makes the "
    "final model's answers likelier. This is that analysis of one model on one data set."
)
OF_RUNS = (
    "After the last update: the mean over seeds and, with three seeds and more, its 95 % interval by Student's t. Win "
    "rates are those of answers drawn to held-out prompts against the start's, ties count a half, with 95 % bootstrap "
    "intervals (BCa) over prompts."
)
OF_ARMS = (
    '"No negative", "no positive" and "no reweighting" take one component out of the gradient; "controlled" is the '
    "schedule of `splits.controlled_dpo()` and `splits.controlled_ppo()`, whose constants are ours."
)
OF_CLAIMS = (
    "What these runs say to the claims that the small study tests, where it measures what they ask for. Claims that "
    "say PPO are of GRPO here. p is corrected for all of them by Holm's procedure."
)
# of the table, after the last update
_COLUMNS = {
    "reward/held_out": "reward",
    "accuracy/held_out": "reward accuracy",
    "dpo_loss/held_out": "DPO's loss, held-out",
    "dpo_loss/train": "DPO's loss, training",
    "kl/held_out": "KL to start",
    "entropy/held_out": "entropy per token",
    "length/held_out": "tokens per answer",
}
FEW = 3


def write_real_report(pool: Pool, output: Path, command: str) -> str:
    """``points.csv``, ``win_rates.json``, ``plots/*.png``, ``report.html`` and ``report.md``.

    Args:
        pool: the runs.
        output: a folder.
        command: that made them.

    Returns:
        the result in one sentence.
    """
    output.mkdir(parents=True, exist_ok=True)
    curves = Curves(pool.results)
    with (output / "points.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([one.name for one in fields(Point)])
        table.writerows(map(astuple, pool.results.points))
    rates = win_rates(pool)
    text = [
        {"method": method, "arm": arm, "win_rate": mean, "low": low, "high": high, "seeds": len(pool.wins[method, arm])}
        for (method, arm), (mean, low, high) in rates.items()
    ]
    (output / "win_rates.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    figures = real_figures(rates)
    (output / "plots").mkdir(exist_ok=True)
    page, result = _page(pool, curves, rates, command), sentence(pool, curves, rates)
    page.heading("Plots")
    page.say("Lines are medians over seeds, bands hold the middle half of them.")
    for name, figure in figures.items():
        drawn = draw(figure, curves, pool.results)
        if drawn is not None:
            svg, picture = drawn
            (output / "plots" / f"{name}.png").write_bytes(picture)
            page.heading(figure.title, 3)
            page.say(figure.caption)
            page.picture(figure.title, svg, f"plots/{name}.png")
    page.heading("Settings")
    page.items([f"`{name}`: {value}" for name, value in pool.settings.items()])
    (output / "report.md").write_text(page.markdown, encoding="utf-8")
    (output / "report.html").write_text(page.html, encoding="utf-8")
    return result


def _page(pool: Pool, curves: Curves, rates: Rates, command: str) -> Page:
    """The report up to its plots."""
    settings = pool.settings
    page = Page(f"What preference optimization does to {settings['model']}")
    page.say(f"**{sentence(pool, curves, rates)}**")
    page.say(ABOUT)
    seeds = ", ".join(map(str, pool.seeds))
    words = RealSettings(**settings).words(list(dict.fromkeys(method for method, _ in pool.ordered())))
    first = f"Data: `{settings['data']}`. Seeds: {seeds}. fused_po {fused_po.__version__}."
    page.items([first, *(f"{line[0].upper()}{line[1:]}." for line in words), *missing(pool)])
    page.say(f"`{command}` made this report.")
    page.heading("The runs")
    page.say(OF_RUNS)
    page.table(["method", "arm", "win rate", *_COLUMNS.values()], list(_rows(pool, curves, rates)))
    page.say(OF_ARMS)
    if found := findings(pool):
        page.heading("Claims")
        page.say(OF_CLAIMS)
        rows = [
            (f"{one.claim.text} ({one.claim.source})", one.claim.number, one.text, one.chance, f"**{one.verdict}**")
            for one in found
        ]
        page.table(["claim", "measured as (above 0: it holds)", "mean", "p", "verdict"], rows)
    return page


def win_rates(pool: Pool) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(method, arm) -> the mean over prompts and seeds, and its bootstrap interval over prompts."""
    found = {}
    for run in pool.ordered():
        if run in pool.wins:
            # a prompt's mean over seeds: what seeds differ in is averaged, not resampled
            prompts = [math.fsum(one) / len(one) for one in zip(*pool.wins[run].values(), strict=True)]
            found[run] = (math.fsum(prompts) / len(prompts), *interval(prompts))
    return found


def sentence(pool: Pool, curves: Curves, rates: Rates) -> str:
    """What came out."""
    name = Path(pool.settings["model"]).name
    parts = []
    for method in dict.fromkeys(method for method, _ in pool.ordered()):
        words = []
        if (method, "full") in rates:
            mean, low, high = rates[method, "full"]
            ends = "" if math.isnan(low) else f" [{100 * low:.0f}, {100 * high:.0f}]"
            others = [f"{arm} {100 * rate[0]:.0f} %" for (own, arm), rate in rates.items() if own == method]
            beside = f" ({', '.join(others[1:])})" if len(others) > 1 else ""
            words.append(f"wins {100 * mean:.0f} %{ends} against the start{beside}")
        if "G" in curves.metrics(method):
            g = curves.array(method, "G")[:, :-1]
            share = numpy.nanmean(numpy.where(numpy.isnan(g), numpy.nan, g > 0)) if not numpy.isnan(g).all() else None
            if share is not None:
                words.append(f"its G lies above 0 at {100 * share:.0f} % of the checkpoints before the last")
        if "accuracy/held_out" in curves.metrics(method) and not rates:
            final = float(numpy.nanmean(curves.array(method, "accuracy/held_out")[:, -1]))
            words.append(f"tells {100 * final:.0f} % of held-out pairs apart")
        if words:
            parts.append(f"{NAMES[method]} {', '.join(words)}")
    seeds = f"{len(pool.seeds)} seed" + "s" * (len(pool.seeds) > 1)
    steps = pool.settings["steps"]
    few = "; too few seeds to say that any difference is more than luck" if len(pool.seeds) < FEW else ""
    return f"{name}, {steps} updates, {seeds}: {'; '.join(parts) or 'nothing was measured'}{few}."


def missing(pool: Pool) -> list[str]:
    """What the study does not say, and why."""
    found = []
    if not any(method == "grpo" for method, _ in pool.ordered()):
        why = "no reward was named (--reward)" if pool.settings["reward"] is None else "it was not asked for"
        found.append(f"Only DPO was run: {why}.")
    undefined = {run: (sum(map(math.isnan, values)), len(values)) for run, values in _g(pool).items()}
    runs = ", ".join(f"{NAMES[m]} {a} at {n} of {count}" for (m, a), (n, count) in undefined.items() if n)
    if runs:
        found.append(
            f"G is not defined where all answers to a prompt get the same reward, so that no advantage is left: {runs} "
            "checkpoints of all seeds."
        )
    if not pool.wins:
        found.append(
            "No win rates: neither a reward (--reward) nor a judge (--judge) was named. AlpacaEval judges the "
            "model_outputs.json of each run against that of the start."
        )
    counts = {run: sum(key[1:] == run for key in pool.runs) for run in pool.ordered()}
    if len(set(counts.values())) > 1:
        found.append("Not all arms have all seeds: " + ", ".join(f"{m} {a} {n}" for (m, a), n in counts.items()) + ".")
    return found


def _g(pool: Pool) -> dict[tuple[str, str], list[float]]:
    """(method, arm) -> G at all checkpoints of all seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in pool.results.points:
        if one.metric == "G":
            found.setdefault((one.method, one.arm), []).append(one.value)
    return found


def findings(pool: Pool) -> list[Finding]:
    """What the runs say to the claims of the small study, as far as their numbers were measured here."""
    points = [
        Point(one.seed, REAL_METHODS[one.method], one.arm, one.step, one.metric, one.value)
        for one in pool.results.points
    ]
    curves = Curves(Results(points))
    return judge(curves, [claim for claim in CLAIMS if _measured(claim, curves)])


def _measured(claim: Claim, curves: Curves) -> bool:
    try:
        return bool(numpy.isfinite(claim.measure(curves)).all())
    # an arm, or a metric, that such a study lacks
    except (KeyError, ValueError, IndexError):
        return False


def _rows(pool: Pool, curves: Curves, rates: Rates) -> Any:
    for method, arm in pool.ordered():
        cells = [NAMES[method], arm, _rate(rates.get((method, arm)))]
        for metric in _COLUMNS:
            known = metric in curves.metrics(method, arm)
            values = curves.array(method, metric, arm)[:, -1] if known else numpy.array([])
            cells.append(_written([one for one in values.tolist() if not math.isnan(one)]))
        yield cells


def _rate(rate: tuple[float, float, float] | None) -> str:
    if rate is None:
        return "-"
    mean, low, high = rate
    return f"{mean:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def _written(values: Sequence[float]) -> str:
    """The mean over seeds; with three of them and more, its interval."""
    if not values:
        return "-"
    return Estimate.of(values).text if len(values) >= FEW else f"{math.fsum(values) / len(values):.3g}"
