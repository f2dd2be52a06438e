"""Panels of the plots: lines are medians over seeds, bands hold the middle half of them, legends stand beside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from numpy import ndarray

from fused_po.study.claims import Curves

__all__ = ["NAMES", "band", "frame", "grid", "heat", "legend", "quartiles"]

NAMES = {"dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
WIDTH, HEIGHT = 3.7, 2.7

# metric of a line, or (metric, arm) -> its name
Lines = Mapping[Any, str]


def quartiles(values: ndarray) -> ndarray:
    """The quartiles over seeds of what is defined, (seeds, ...) -> (3, ...); NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found: ndarray = numpy.nanquantile(values, (0.25, 0.5, 0.75), axis=0)
    return found


def band(axis: Any, x: Sequence[float] | ndarray, values: ndarray, label: str, number: int, alpha: float = 0.2) -> None:
    """A line with its band, from values (seeds, x); ``number`` chooses its colour, ``alpha`` how strong the band is."""
    low, middle, high = quartiles(values)
    axis.plot(x, middle, label=label, color=f"C{number % 10}", linewidth=1.6)
    axis.fill_between(x, low, high, color=f"C{number % 10}", alpha=alpha, linewidth=0)


def frame(axis: Any, title: str, ylabel: str, zero: bool = False, xlabel: str = "updates") -> None:
    """Titles, labels and a faint grid."""
    axis.set_title(title)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    if xlabel == "updates":
        axis.xaxis.get_major_locator().set_params(integer=True)
    if zero:
        axis.axhline(0.0, color="black", linewidth=0.6)


def legend(axis: Any) -> None:
    """To the right of an axis, where no line runs."""
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def grid(canvas: Any, curves: Curves, panels: Sequence[tuple[str, Lines]], zero: bool = False) -> None:
    """A row for each method, a column for each panel (label of its axis, its lines).

    Raises:
        KeyError: no method has any of the lines.
    """
    rows = [method for method in dict.fromkeys(m for m, _ in curves.runs()) if _has(curves, method, panels)]
    if not rows:
        raise KeyError(panels[0][0])
    # one panel a method: side by side
    shape = (len(rows), len(panels)) if len(panels) > 1 else (1, len(rows))
    canvas.set_size_inches(WIDTH * shape[1] + 1.0, HEIGHT * shape[0])
    axes = canvas.subplots(*shape, squeeze=False).reshape(len(rows), len(panels))
    alike = len({tuple(lines.values()) for _, lines in panels}) == 1
    beside = rows if len(panels) == 1 else []
    for row, method in zip(axes, rows, strict=True):
        for axis, (ylabel, lines) in zip(row, panels, strict=True):
            for number, (line, label) in enumerate(lines.items()):
                metric, arm = (line, "full") if isinstance(line, str) else line
                if metric in curves.metrics(method, arm):
                    band(
                        axis,
                        curves.steps(method, metric, arm),
                        curves.array(method, metric, arm),
                        label,
                        number,
                        0.2 if len(lines) < 4 else 0.1,
                    )
                elif any(_has(curves, one, [(ylabel, {line: label})]) for one in beside):
                    # the legend stands for those panels too that have the line
                    axis.plot([], [], label=label, color=f"C{number % 10}", linewidth=1.6)
            drawn = list(axis.get_lines())
            frame(axis, NAMES.get(method, method), ylabel, zero)
            # numbers themselves, not what is left of them above one that stands apart
            axis.yaxis.get_major_formatter().set_useOffset(False)
            if not any(numpy.isfinite(line.get_ydata()).any() for line in drawn):
                axis.set(xticks=[], yticks=[])
                axis.text(0.5, 0.6, "not defined in these runs", ha="center", transform=axis.transAxes)
            last = axis is row[-1] and (len(panels) > 1 or method == rows[-1])
            if len(lines) > 1 and (last or not alike):
                legend(axis)


def _has(curves: Curves, method: str, panels: Sequence[tuple[str, Lines]]) -> bool:
    wanted = [(line, "full") if isinstance(line, str) else line for _, lines in panels for line in lines]
    return any(metric in curves.metrics(method, arm) for metric, arm in wanted)


def heat(axis: Any, values: ndarray, columns: Sequence[Any], rows: Sequence[Any], numbers: bool) -> Any:
    """A table as colours, red above 0 and blue below; ``numbers`` writes them into it."""
    largest = float(numpy.nanmax(numpy.abs(values), initial=0.0)) or 1.0
    image = axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", origin="upper")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    for (row, column), value in numpy.ndenumerate(values) if numbers else ():
        if not math.isnan(value):
            color = "white" if abs(value) > 0.6 * largest else "black"
            axis.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)
    return image
