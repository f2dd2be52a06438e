"""What a study leaves: tables as CSV, plots as PNG, and a report as HTML and Markdown with the same contents."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fused_po.study.claims import FALSE_VERDICTS, Curves, Finding, judge
from fused_po.study.estimates import written
from fused_po.study.figures import FIGURES, draw
from fused_po.study.run import Bin, Point, Results
from fused_po.study.settings import ARMS, METHODS, Settings

__all__ = ["read_results", "write_report", "write_results"]

_TEMPLATES = Path(__file__).parent
# of the table of arms, over the last third of a run
_COLUMNS = {
    "reward/held_out": "held-out reward",
    "reward/train": "training reward",
    "reward/gap": "gap",
    "entropy/held_out": "entropy per token",
    "distinct/held_out": "distinct answers",
    "kl/held_out": "KL to start",
}


def write_results(results: Results, output: Path) -> None:
    """``points.csv`` and ``coefficients.csv``: every number, a line each."""
    _write(output / "points.csv", Point, map(asdict, results.points))
    _write(output / "coefficients.csv", Bin, map(asdict, results.bins))


def read_results(output: Path) -> Results:
    """What ``write_results`` wrote."""
    return Results(_read(output / "points.csv", Point), _read(output / "coefficients.csv", Bin))


def write_report(
    results: Results,
    settings: Settings,
    output: Path,
    command: str,
    seconds: float,
    failures: Mapping[int, str] | None = None,
) -> list[Finding]:
    """``claims.csv``, ``plots/*.png``, ``report.html`` and ``report.md``.

    Args:
        results: of all seeds.
        settings: what was run.
        output: a folder.
        command: that repeats the study.
        seconds: of processor time that it took.
        failures: seeds without results, and what they failed with.

    Returns:
        what the runs say to each claim.
    """
    from jinja2 import Environment, FileSystemLoader

    curves = Curves(results)
    findings = judge(curves)
    with (output / "claims.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        names = [f"seed {seed}" for seed in curves.seeds]
        table.writerow(["claim", "source", "number", "figure", "verdict", "mean", "standard error", "p", *names])
        for one in findings:
            claim = one.claim
            row = [claim.text, claim.source, claim.number, claim.figure, one.verdict, one.mean, one.error, one.p]
            table.writerow([*row, *one.values])
    (output / "plots").mkdir(exist_ok=True)
    images = {}
    for name, figure in FIGURES.items():
        images[name], picture = draw(figure, curves, results)
        (output / "plots" / f"{name}.png").write_bytes(picture)
    context = {
        "command": command,
        "minutes": seconds / 60,
        "settings": asdict(settings),
        "seeds": curves.seeds,
        "failures": failures or {},
        "findings": findings,
        "rate": FALSE_VERDICTS,
        "figures": FIGURES,
        "images": images,
        "columns": list(_COLUMNS.values()),
        "arms": list(_arms(curves)),
    }
    for name in ("report.html", "report.md"):
        environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=name.endswith("html"),
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        (output / name).write_text(environment.get_template(f"{name}.j2").render(context), encoding="utf-8")
    return findings


def _arms(curves: Curves) -> Iterable[dict[str, Any]]:
    for method in METHODS:
        for arm in ARMS[method]:
            values = [[curves.late(seed, method, metric, arm) for seed in curves.seeds] for metric in _COLUMNS]
            yield {"method": method.upper(), "arm": arm, "cells": [written(row) for row in values]}


def _write(path: Path, kind: type, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [one.name for one in fields(kind)])
        table.writeheader()
        table.writerows(rows)


def _read(path: Path, kind: type) -> list[Any]:
    convert = {one.name: {"int": int, "float": float}.get(str(one.type), str) for one in fields(kind)}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: convert[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]
