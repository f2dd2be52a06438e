"""The arm without reweighting where an update is made of several batches: every sample gets one weight, whatever batch
it is in.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from fused_po import splits
from fused_po.splits import Split
from fused_po.trainers.whole import write_text

__all__ = ["FlatWeights"]

_FILE = "mean_weight.json"


class FlatWeights:
    """In the place of a ``Split``: ``splits.no_reweighting`` with the mean weight of the update before, over all its
    batches. The mean over one batch of two pairs would be nearly their own weights.

    Args:
        initial: the weight before any is known; None: the mean of the first batch.
    """

    def __init__(self, initial: float | None) -> None:
        self._mean, self._progress = initial, -1.0
        self._sum, self._count = 0.0, 0.0

    def note(self, weights: Tensor, counts: Tensor | None = None) -> None:
        """Weights of a batch's samples; ``counts``: of how many samples each is."""
        self._sum += float((weights if counts is None else weights * counts).sum())
        self._count += float(weights.numel() if counts is None else counts.sum())

    def at(self, progress: float) -> Split:
        """The split at a fraction of the training."""
        if progress != self._progress:
            if self._progress >= 0 and self._count:
                self._mean, self._sum, self._count = self._sum / self._count, 0.0, 0.0
            self._progress = progress
        mean = self._mean if self._mean is not None else self._sum / (self._count or 1.0)
        return splits.no_reweighting("running", mean).at(progress)

    def save(self, folder: Path) -> None:
        """Beside a checkpoint."""
        mean = self._sum / self._count if self._count else self._mean
        write_text(folder / _FILE, json.dumps(mean) + "\n")

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether it was saved there."""
        return (folder / _FILE).is_file()

    def restore(self, folder: Path) -> None:
        """From a checkpoint."""
        self._mean = json.loads((folder / _FILE).read_text(encoding="utf-8"))
