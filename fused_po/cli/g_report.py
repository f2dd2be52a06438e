"""What ``fused-po g`` writes: every number as CSV, one plot and a sentence."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_po.diagnostics.alignment import DOUBTFUL
from fused_po.pictures import png

if TYPE_CHECKING:
    from fused_po.cli.g_data import Data

__all__ = ["described", "draws_of", "sentence", "write"]

_LINES = {
    "sides": {"whole": "whole", "positive": "positive", "negative": "negative"},
    "thirds of the positive side": {f"positive/{third}": f"{third} third" for third in ("top", "middle", "bottom")},
    "thirds of the negative side": {f"negative/{third}": f"{third} third" for third in ("top", "middle", "bottom")},
}
_COLOURS = ("#0b7285", "#c92a2a", "#5f3dc4")

Points = Sequence[Mapping[str, Any]]


def write(points: Points, loss: str, output: Path, described: Sequence[str]) -> str:
    """Write g.csv, g.png and g.md.

    Args:
        described: what was measured, an item each.

    Returns:
        the sentence of g.md.
    """
    _write_csv(points, output / "g.csv")
    (output / "g.png").write_bytes(_plot(points, loss))
    said = sentence(points)
    items = "".join(f"- {one}\n" for one in described)
    text = f"# G over training, loss {loss}\n\n{said}\n\n![G over training](g.png)\n\nEvery number: g.csv.\n\n{items}"
    (output / "g.md").write_text(text, encoding="utf-8")
    return said


def described(
    arguments: argparse.Namespace, data: Data, folders: Sequence[Path], targets: Sequence[Sequence[Any]]
) -> list[str]:
    """What was measured, an item each, by which somebody else can measure it again."""
    of = {"greedy": "greedy answers", "sampled": f"sampled answers, in each of {len(targets)} draws,"}
    final = folders[-1].name if arguments.final in of else arguments.final
    found = [
        f"D: {arguments.data}, {data.said}",
        f"D': {len(targets[0])} {of.get(arguments.final, 'answers')} of {final}",
    ]
    if data.needs_reference:
        found.append(f"reference: {arguments.reference or f'{folders[0].name}, the first checkpoint'}")
    return [*found, f"method {arguments.method}, {arguments.dtype}; all flags are in settings.json"]


def sentence(points: Points) -> str:
    """What G says of the run, in one sentence."""
    whole = [statistics.fmean(draws_of(point, "whole")) for point in points]
    spread = [_spread(draws_of(point, "whole")) for point in points]
    above = sum(mean > one for mean, one in zip(whole, spread, strict=True))
    below = sum(mean < -one for mean, one in zip(whole, spread, strict=True))
    count = len(points)
    cosine = statistics.fmean(statistics.fmean(draws_of(point, "whole", "cosine")) for point in points)
    beyond = " by more than twice the standard error over draws of D'" if any(spread) else ""
    negative = sum(
        abs(statistics.fmean(draws_of(p, "negative"))) > abs(statistics.fmean(draws_of(p, "positive"))) for p in points
    )
    errors = [draw["error"] for point in points for draw in point["draws"] if draw["error"] is not None]
    found = (
        f"G of the whole loss is above 0{beyond} at {above} of {count} checkpoints and below at {below}; the two "
        f"gradients have a mean cosine of {cosine:.2g}; the negative side is the larger one at {negative} of {count}"
    )
    if not errors:
        return f"{found}."
    doubt = "" if max(errors) <= DOUBTFUL else ", which is too little: --method exact takes none"
    return f"{found} (steps agree to {100 * max(errors):.2g} % of the sides{doubt})."


def draws_of(point: Mapping[str, Any], part: str, kind: str = "g") -> list[float]:
    """G of a part (or its cosine) over all blocks, for each draw of D'."""
    found = [draw[kind][part] for draw in point["draws"]]
    return [sum(one.values()) if isinstance(one, dict) else one for one in found]


def _spread(values: Sequence[float]) -> float:
    """Twice the standard error of the mean over draws of D'; 0 of a single one."""
    return 2 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _write_csv(points: Points, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["checkpoint", "step", "draw", "part", "block", "g", "cosine", "error", "target_nll"])
        for point in points:
            for number, draw in enumerate(point["draws"]):
                # those of the whole gradients for every part and block, so that cosines sum as G does
                lengths = math.prod(draw["norms"])
                for part, blocks in draw["g"].items():
                    for block, value in blocks.items():
                        head = [point["checkpoint"], point["step"], number, part, block, value]
                        table.writerow([*head, value / lengths if lengths else 0.0, draw["error"], draw["nll"]])


def _plot(points: Points, loss: str) -> bytes:
    from matplotlib.figure import Figure

    parts = points[0]["draws"][0]["g"]
    panels = {title: lines for title, lines in _LINES.items() if all(part in parts for part in lines)}
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    steps = [point["step"] for point in points]
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.axhline(0, color="0.6", linewidth=0.8)
        for colour, (part, name) in zip(_COLOURS, lines.items(), strict=True):
            means = [statistics.fmean(draws_of(point, part)) for point in points]
            wide = [_spread(draws_of(point, part)) for point in points]
            axis.plot(steps, means, marker="o", markersize=3, color=colour, label=name)
            if any(wide):
                low, high = ([m + sign * w for m, w in zip(means, wide, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="step", ylabel="G")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    figure.suptitle(
        f"G over training, loss {loss}"
        + (", band: twice the standard error over draws of D'" * (len(points[0]["draws"]) > 1)),
        fontsize=10,
    )
    return png(figure, description=sentence(points))
