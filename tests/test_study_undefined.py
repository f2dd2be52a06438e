"""A policy whose answers all get the same reward has no advantage, and no G: its report says so."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from fused_po.study.claims import Curves
from fused_po.study.panels import grid
from fused_po.study.real_pool import Pool
from fused_po.study.real_report import missing
from fused_po.study.run import Point, Results

STEPS = (0, 2, 4)


def results(policy: dict[int, float]) -> Results:
    of = {"dpo": dict.fromkeys(STEPS, 1.0), "grpo": policy}
    return Results([Point(0, method, "full", step, "G", of[method][step]) for method in of for step in STEPS])


def said(found: Results) -> list[str]:
    runs = {(0, method, "full"): Path() for method in ("dpo", "grpo")}
    wins = {(method, "full"): {0: [0.5]} for method in ("dpo", "grpo")}
    return missing(Pool(found, {"reward": "a:b"}, wins, runs, {}, {}))


def texts(found: Results) -> list[list[str]]:
    canvas = Figure()
    grid(canvas, Curves(found), [("G", {"G": "G"})], zero=True)
    return [[text.get_text() for text in axis.texts] for axis in canvas.axes]


def test_g_that_is_nowhere_defined_is_said() -> None:
    undefined = results(dict.fromkeys(STEPS, math.nan))
    (line,) = said(undefined)
    assert "same reward" in line and "GRPO full at 3 of 3 checkpoints" in line and "DPO" not in line
    assert texts(undefined) == [[], ["not defined in these runs"]]


def test_some_of_it_is_drawn() -> None:
    some = results({0: math.nan, 2: 1.0, 4: -1.0})
    (line,) = said(some)
    assert "GRPO full at 1 of 3 checkpoints" in line
    assert texts(some) == [[], []] and said(results(dict.fromkeys(STEPS, 2.0))) == []


def test_the_legend_holds_the_lines_of_all_panels() -> None:
    found = results(dict.fromkeys(STEPS, math.nan))
    found.points.extend(Point(0, "dpo", "full", step, "G/positive", 1.0) for step in STEPS)
    canvas = Figure()
    grid(canvas, Curves(found), [("G", {"G/positive": "positive", "G": "whole", "G/none": "nowhere"})])
    (shown,) = [axis.get_legend() for axis in canvas.axes if axis.get_legend()]
    assert [text.get_text() for text in shown.get_texts()] == ["positive", "whole"]
