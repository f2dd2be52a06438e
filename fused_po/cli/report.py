"""The plot of a training run."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["plot"]

_PANELS = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}


def plot(log: Path, image: Path, title: str) -> None:
    """Draw loss, reward accuracy and margin over the steps of a metrics.jsonl, training and held-out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(13, 3.6), layout="constrained")
    for axis, (name, label) in zip(axes, _PANELS.items(), strict=True):
        for split, style in (("train", "-"), ("eval", "o-")):
            points = [(row["step"], row[name]) for row in rows if row["split"] == split and name in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, label="held-out" if split == "eval" else split)
        axis.set_xlabel("step")
        axis.set_title(label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    figure.savefig(image, dpi=120)
    pyplot.close(figure)
