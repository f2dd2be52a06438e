"""The files of a study: its numbers as CSV, its plots, and a report as HTML and Markdown."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fused_po.study.claims import Claim, Curves, Finding, judge, late
from fused_po.study.estimates import LEVEL, power, seeds_for, written
from fused_po.study.figures import FIGURES, draw, draw_findings
from fused_po.study.page import Page, anchor
from fused_po.study.panels import NAMES
from fused_po.study.paper import CLAIMS
from fused_po.study.run import Bin, Point, Results

__all__ = ["About", "in_words", "read_results", "result", "strength", "write_report", "write_results"]

# of the table of arms, over the last third of a run
_COLUMNS = {
    "reward/held_out": "held-out reward",
    "reward/train": "training reward",
    "reward/gap": "gap",
    "pass@8/held_out": "pass@8",
    "accuracy/held_out": "accuracy on pairs",
    "entropy/held_out": "entropy per token (nats)",
    "distinct/held_out": "distinct answers",
    "kl/held_out": "KL to start (nats per answer)",
}
SMOKE = "**A smoke run: it shows that everything works, and says nothing about the claims.**"


@dataclass(frozen=True)
class About:
    """What was run, in words.

    Attributes:
        title: of the report.
        lines: model, data, sizes and versions, what D and D' are; each may hold ``**bold**`` and ```code```.
        settings: name -> value.
        command: that repeats the study.
        seconds: of processor time.
        smoke: the runs only show that everything works: there are no verdicts.
        notes: on single figures and claims, said above the claims.
    """

    title: str
    lines: Sequence[str]
    settings: Mapping[str, Any]
    command: str
    seconds: float
    smoke: bool = False
    notes: Sequence[str] = field(default_factory=tuple)


def write_results(results: Results, output: Path) -> None:
    """``points.csv`` and ``coefficients.csv``: every number, a line each."""
    _write(output / "points.csv", Point, map(asdict, results.points))
    _write(output / "coefficients.csv", Bin, map(asdict, results.bins))


def read_results(output: Path) -> Results:
    """What ``write_results`` wrote."""
    return Results(_read(output / "points.csv", Point), _read(output / "coefficients.csv", Bin))


def write_report(
    results: Results,
    about: About,
    output: Path,
    failures: Mapping[int, str] | None = None,
    claims: Sequence[Claim] = CLAIMS,
) -> list[Finding]:
    """``claims.csv``, ``plots/*.png``, ``report.html`` and ``report.md``.

    Args:
        results: of all seeds.
        about: what was run.
        output: a folder.
        failures: seeds without results, and what they failed with.
        claims: the confirmatory ones among them share Holm's correction.

    Returns:
        what the runs say to each claim.
    """
    curves = Curves(results)
    findings = judge(curves, claims, about.smoke)
    _write_claims(findings, curves.seeds, output / "claims.csv")
    (output / "plots").mkdir(exist_ok=True)
    images = {"claims": draw_findings(findings)}
    for name, figure in FIGURES.items():
        drawn = draw(figure, curves, results)
        if drawn is not None:
            images[name] = drawn
    for name, (_, picture) in images.items():
        (output / "plots" / f"{name}.png").write_bytes(picture)
    page = _page(findings, curves, about, {name: svg for name, (svg, _) in images.items()}, failures or {})
    (output / "report.md").write_text(page.markdown, encoding="utf-8")
    (output / "report.html").write_text(page.html, encoding="utf-8")
    return findings


def result(findings: Sequence[Finding], seeds: int) -> str:
    """The outcome of the confirmatory claims in one sentence."""
    verdicts = [one.verdict for one in findings if one.claim.confirmatory]
    if "smoke run" in verdicts:
        return SMOKE
    count = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    supported, contradicted = count.pop("supported", 0), count.pop("contradicted", 0)
    rest = "".join(f"; {number} {'is' if number == 1 else 'are'} {verdict}" for verdict, number in count.items())
    return (
        f"**Of {len(verdicts)} claims fixed before the runs, {supported} {'is' if supported == 1 else 'are'} supported "
        f"and {contradicted} contradicted{rest}; by {seeds} {'seed' if seeds == 1 else 'seeds'}.**"
    )


def in_words(findings: Sequence[Finding], plots: str, failures: Mapping[int, str] | None = None) -> str:
    """The outcome as Markdown, by verdict, and what was looked at besides; ``plots`` leads to the plots' folder."""
    parts = [result(findings, len(findings[0].values)), *_failed(failures or {})]
    tested = [one for one in findings if one.claim.confirmatory]
    for verdict in sorted({one.verdict for one in tested}, key=lambda one: (one != "supported", one)):
        lines = [
            f"**{verdict}**: {one.claim.text} Measured: {one.claim.number}; {one.text}, effect size "
            f"{one.estimate.effect}, p {one.chance}. Source: {one.claim.source}. {one.claim.note}"
            for one in tested
            if one.verdict == verdict
        ]
        shown = [one for one in tested if one.verdict == verdict]
        parts += [f"## {verdict.capitalize()}", _items(lines, shown, plots)]
    looked = [one for one in findings if not one.claim.confirmatory]
    if looked:
        lines = [f"{one.claim.text} Measured: {one.claim.number}; {one.text}." for one in looked]
        parts += [
            "## Looked at besides",
            "Without verdicts; above 0, what is said is so.",
            _items(lines, looked, plots),
        ]
    return "\n\n".join(parts) + "\n"


def _items(lines: Sequence[str], findings: Sequence[Finding], plots: str) -> str:
    items = [
        f"- {line.strip()} ([plot]({plots}/{one.claim.figure}.png))" for line, one in zip(lines, findings, strict=True)
    ]
    return "\n".join(
        textwrap.fill(one, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) for one in items
    )


def _write_claims(findings: Sequence[Finding], seeds: Sequence[int], path: Path) -> None:
    numbers = ["mean", "low", "high", "d", "d_low", "d_high"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        words = ["claim", "source", "number", "figure", "kind", "verdict"]
        table.writerow([*words, *numbers, "p", "p_holm", *(f"seed {seed}" for seed in seeds)])
        for one in findings:
            claim = one.claim
            kind = "confirmatory" if claim.confirmatory else "exploratory"
            row = [claim.text, claim.source, claim.number, claim.figure, kind, one.verdict]
            row += [f"{getattr(one.estimate, name):.6g}" for name in numbers]
            table.writerow([*row, f"{one.p:.4g}", f"{one.p_holm:.4g}", *(f"{value:.6g}" for value in one.values)])


def _page(
    findings: Sequence[Finding], curves: Curves, about: About, images: Mapping[str, str], failures: Mapping[int, str]
) -> Page:
    page, seeds = Page(about.title), len(curves.seeds)
    page.say(result(findings, seeds))
    page.say(
        '"What Is Preference Optimization Doing, How and Why?" (arXiv 2512.00778) takes preference optimization apart '
        "into positive learning, negative learning and loss reweighting, and watches each by G: whether a step on it "
        "makes the final model's answers likelier. D are the examples that the loss is taken on, D' those answers."
    )
    page.items([*about.lines, *about.notes, *_failed(failures)])
    page.say(f"`{about.command}` repeats it; it took {about.seconds / 60:.0f} minutes of processor time.")
    page.heading("The claims")
    for words in _method(findings, seeds, about.smoke):
        page.say(words)
    page.picture("The claims", images["claims"], "plots/claims.png")
    tested = [one for one in findings if one.claim.confirmatory]
    page.table(
        ["claim", "said by", "measured as (above 0: it holds)", "mean [95 %]", "effect [95 %]", "p, Holm", "verdict"],
        [
            [
                _linked(one, images),
                one.claim.source,
                one.claim.number,
                one.text,
                one.estimate.effect,
                one.chance,
                f"**{one.verdict}**" + (f". {one.claim.note}" if one.claim.note else ""),
            ]
            for one in tested
        ],
    )
    looked = [one for one in findings if not one.claim.confirmatory]
    if looked:
        page.heading("Looked at besides")
        page.say(
            "Exploratory: no verdicts, and intervals that are not corrected for being many. Above 0: what the first "
            "column says is so."
        )
        page.table(
            ["what", "said by", "measured as", "mean [95 %]", "effect [95 %]"],
            [
                [_linked(one, images), one.claim.source, one.claim.number, one.text, one.estimate.effect]
                for one in looked
            ],
        )
    page.heading("The runs")
    page.say(
        "Means over the last third of the checkpoints, ± standard errors over seeds. No negative, no positive and "
        "no reweighting take one component out of the gradient; controlled is `splits.controlled_dpo()` and "
        "`splits.controlled_ppo()`, whose constants are ours."
    )
    page.table(["method", "arm", *_COLUMNS.values()], list(_arms(curves)))
    page.heading("Plots")
    page.say("Lines are medians over seeds, bands hold the middle half of them.")
    for name in (name for name in FIGURES if name in images):
        page.heading(FIGURES[name].title, 3)
        page.say(FIGURES[name].caption)
        page.picture(FIGURES[name].title, images[name], f"plots/{name}.png")
    page.heading("Settings")
    page.items([f"`{name}`: {value}" for name, value in about.settings.items()])
    return page


def _failed(failures: Mapping[int, str]) -> list[str]:
    return [f"**Seed {seed} failed** and is left out: {message}" for seed, message in failures.items()]


def _method(findings: Sequence[Finding], seeds: int, smoke: bool) -> list[str]:
    count = sum(one.claim.confirmatory for one in findings)
    if smoke or not count:
        return [SMOKE] if smoke else []
    words = (
        f"{count} claims were fixed before the runs. Each has one number a seed; it is **supported** or "
        f"**contradicted**, by the sign of the mean over seeds, where Student's t test says that the mean is not 0, at "
        f"{LEVEL:.0%} for all claims together (Holm's correction), else **not shown**; **not measured** where a seed "
        "has no such number. Effect sizes are means over the standard deviation of single seeds (Hedges' g). "
        "Checkpoints at which a number is not defined, as the cosine of a gradient of 0, are left out of the mean of "
        "their seed. Intervals are those of each claim for itself: one may leave 0 out and the claim be not shown."
    )
    return [words, strength(seeds, count)]


def strength(seeds: int, count: int) -> str:
    """What so many seeds can find, of so many claims."""
    if seeds < 2:
        return "One seed decides nothing."
    return (
        f"Power: with {seeds} seeds an effect of one standard deviation passes Holm's first, strictest step in "
        f"{power(seeds, count):.0%} of studies, one of half a standard deviation in {power(seeds, count, 0.5):.0%}; "
        f"{seeds_for(0.8, count)} seeds find the former in four of five. Not shown does not mean absent: see the "
        "intervals. All of this holds where the number of seeds was chosen before a verdict was seen: who adds seeds "
        "until one stands finds too many."
    )


def _linked(one: Finding, images: Mapping[str, str]) -> str:
    name = one.claim.figure
    return f"{one.claim.text} [Plot](#{anchor(FIGURES[name].title)})" if name in images else one.claim.text


def _arms(curves: Curves) -> Iterable[list[str]]:
    for method, arm in curves.runs():
        cells = []
        for metric in _COLUMNS:
            known = metric in curves.metrics(method, arm)
            cells.append(written(late(curves, method, metric, arm).tolist()) if known else "-")
        yield [NAMES.get(method, method), arm, *cells]


def _write(path: Path, kind: type, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [one.name for one in fields(kind)])
        table.writeheader()
        table.writerows(rows)


def _read(path: Path, kind: type) -> list[Any]:
    convert = {one.name: {"int": int, "float": float}.get(str(one.type), str) for one in fields(kind)}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: convert[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]
