"""The report of a study on a pretrained model: one sentence, a table, plots and claims, as HTML and Markdown."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import numpy

import fused_po
from fused_po.diagnostics.alignment import DOUBTFUL
from fused_po.study.claims import Claim, Curves, Finding, judge
from fused_po.study.estimates import Estimate, written
from fused_po.study.figures import draw
from fused_po.study.page import Page
from fused_po.study.paper import CLAIMS
from fused_po.study.real_figures import Rates, real_figures
from fused_po.study.real_g import NUMBERS
from fused_po.study.real_measure import interval
from fused_po.study.real_pool import Pool
from fused_po.study.real_settings import NAMES, REAL_METHODS, RealSettings
from fused_po.study.report import strength
from fused_po.study.run import Point, Results

__all__ = ["RECORDED", "write_real_report"]

ABOUT = (
    '"What Is Preference Optimization Doing, How and Why?" (arXiv 2512.00778) takes preference optimization apart into '
    "positive learning, negative learning and loss reweighting, and watches each by G: whether a step on it makes the "
    "final model's answers likelier. This is that analysis of one model on one data set."
)
OF_RUNS = (
    "After the last update: the mean over seeds and, with three seeds and more, its 95 % interval by Student's t. Win "
    "rates are those of answers drawn to held-out prompts against the start's, ties count a half, with 95 % bootstrap "
    "intervals (BCa) over prompts: they hold for the mean of these runs, what other seeds would do is not in them."
)
OF_ARMS = (
    '"No negative", "no positive" and "no reweighting" take one component out of the gradient; "controlled" is the '
    "schedule of `splits.controlled_dpo()` and `splits.controlled_ppo()`, whose constants are ours."
)
OF_CLAIMS = (
    "What these runs say to the claims of the small study, as far as such a study and these arms measure what they "
    "ask for, whatever came out; one that a seed has no number for is not measured. Claims that say PPO are of GRPO "
    "here. p is that of Student's t test on one number a seed, corrected by Holm's procedure for all claims that are "
    "not exploratory; intervals are those of each claim for itself. **Seeds share the model, the pairs and the held-"
    "out prompts**: they differ in the order of rows, in adapters and in what is drawn, so a verdict says that an "
    "effect is more than these, and nothing of other data."
)
# what is measured of every arm; with a reward or a judge more
RECORDED = (
    *(f"{name}/{part}" for name in ("dpo_loss", "accuracy", "margin") for part in ("train", "held_out")),
    *(f"{name}/{side}" for name in ("drift", "max_prob") for side in ("chosen", "rejected")),
    *(f"{name}/held_out" for name in ("kl", "entropy", "length")),
)
# of the table, after the last update
_COLUMNS = {
    "reward/held_out": "reward",
    "accuracy/held_out": "reward accuracy",
    "dpo_loss/held_out": "DPO's loss, held-out (nats)",
    "dpo_loss/train": "DPO's loss, training (nats)",
    "kl/held_out": "KL to start (nats per answer)",
    "entropy/held_out": "entropy per token (nats)",
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
    curves, finished = Curves(pool.results), Curves(pool.finished())
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
    page, result = _page(pool, finished, rates, command), sentence(pool, finished, rates)
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
        if count := sum(one.claim.confirmatory for one in found):
            page.say(strength(len(curves.seeds), count))
        rows = [
            (
                f"{one.claim.text} ({one.claim.source})",
                one.claim.number,
                one.text,
                one.estimate.effect,
                one.chance,
                f"**{one.verdict}**",
            )
            for one in found
        ]
        head = ["claim", "measured as (above 0: it holds)", "mean [95 %]", "effect [95 %]", "p, Holm", "verdict"]
        page.table(head, rows)
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
    count = len(curves.seeds)
    seeds = f"{count} seed" + "s" * (count != 1)
    steps = pool.settings["steps"]
    few = "; too few seeds to say that any difference is more than luck" if count < FEW else ""
    return f"{name}, {steps} updates, {seeds}: {'; '.join(parts) or 'no run is finished'}{few}."


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
    if pool.unfinished:
        runs = ", ".join(
            f"seed {seed} {NAMES[method]} {arm} (update {step} of {pool.settings['steps']})"
            for (seed, method, arm), step in pool.unfinished.items()
        )
        found.append(f"**Not finished**, and left out of everything but the plots: {runs}.")
    counts = {run: sum(key[1:] == run for key in pool.runs if key not in pool.unfinished) for run in pool.ordered()}
    if len(set(counts.values())) > 1:
        found.append("Not all arms have all seeds: " + ", ".join(f"{m} {a} {n}" for (m, a), n in counts.items()) + ".")
    for name, values in pool.mixed.items():
        found.append(f"**Not all runs are alike**: {name} is {', '.join(values[:-1])} or {values[-1]}.")
    errors = [one.value for one in pool.results.points if one.metric == "G/error"]
    if errors:
        doubt = ", **which is much**: `--estimator exact` takes no steps" if max(errors) > DOUBTFUL else ""
        found.append(
            f"G is taken by steps along the gradient of D', two of which differ by up to {100 * max(errors):.2g} % of "
            f"the sum of the sides' sizes{doubt}."
        )
    return found


def _g(pool: Pool) -> dict[tuple[str, str], list[float]]:
    """(method, arm) -> G at all checkpoints of all seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in pool.results.points:
        if one.metric == "G":
            found.setdefault((one.method, one.arm), []).append(one.value)
    return found


def findings(pool: Pool) -> list[Finding]:
    """What the finished runs say to the claims of the small study that such a study can measure."""
    of_arms = (*RECORDED, *(["reward/held_out"] if pool.settings["reward"] is not None else []))
    metrics = {(REAL_METHODS[m], arm): of_arms + (NUMBERS if arm == "full" else ()) for m, arm in pool.ordered()}
    planned = Curves.of({(*run, metric): numpy.zeros((2, 3)) for run, names in metrics.items() for metric in names})
    own = Curves(Results([replace(one, method=REAL_METHODS[one.method]) for one in pool.finished().points]))
    return judge(own, [claim for claim in CLAIMS if _can_measure(claim, planned)]) if own.seeds else []


def _can_measure(claim: Claim, planned: Curves) -> bool:
    """By what is measured at all, not by what came out: a claim that a seed has no number for stays one of several."""
    try:
        claim.measure(planned)
    except KeyError:
        return False
    return True


def _rows(pool: Pool, curves: Curves, rates: Rates) -> Any:
    for method, arm in pool.ordered():
        cells = [NAMES[method], arm, _rate(rates.get((method, arm)))]
        own = [
            place
            for place, seed in enumerate(curves.seeds)
            if (seed, method, arm) in pool.runs.keys() - pool.unfinished
        ]
        for metric in _COLUMNS:
            known = metric in curves.metrics(method, arm)
            cells.append(_written(curves.array(method, metric, arm)[own, -1].tolist() if known else []))
        yield cells


def _rate(rate: tuple[float, float, float] | None) -> str:
    if rate is None:
        return "-"
    mean, low, high = rate
    return f"{mean:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def _written(values: Sequence[float]) -> str:
    """The mean over seeds; with three of them and more, its interval; or in how many it is missing."""
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return written(values)
    return Estimate.of(values).text if len(values) >= FEW else f"{math.fsum(values) / len(values):.3g}"
