"""Runs of one study, wherever they stand: those of several output folders are taken together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_po.study.reading import reading
from fused_po.study.real_run import points_of
from fused_po.study.real_settings import NAMES, arms_of
from fused_po.study.run import Results
from fused_po.trainers.whole import json_lines

__all__ = ["Pool", "pooled"]

# of a run, and not of the study that it is one of
_OF_RUN = ("seed", "method", "arm")


@dataclass(frozen=True)
class Pool:
    """Runs with the same settings on the same data.

    Attributes:
        results: their numbers.
        settings: that they share.
        wins: (method, arm) -> seed -> instruction -> how often the final answer wins, for each held-out prompt.
        runs: (seed, method, arm), each with the folder that it stands in.
    """

    results: Results
    settings: dict[str, Any]
    wins: dict[tuple[str, str], dict[int, list[float]]]
    runs: dict[tuple[int, str, str], Path]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for seed, _, _ in self.runs})

    def ordered(self) -> list[tuple[str, str]]:
        """(method, arm), in the order in which they are shown."""
        found = {(method, arm) for _, method, arm in self.runs}
        return [(method, arm) for method in NAMES for arm in arms_of(method) if (method, arm) in found]


def pooled(folders: Sequence[Path]) -> Pool:
    """The runs in the output folders of studies.

    Raises:
        ValueError: a folder that is not there or holds no numbers, runs of different studies, a run in two folders.
    """
    found: dict[tuple[int, str, str], Path] = {}
    shared: dict[str, Any] = {}
    first = Path()
    settings: dict[str, Any] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        runs = sorted(path.parent for path in folder.glob("seed-*/*/*/run.json"))
        runs = [run for run in runs if (run / "points.jsonl").exists()]
        if not runs:
            raise ValueError(f"{folder} holds no run of a study")
        for run in runs:
            with reading(run / "run.json"):
                about = json.loads((run / "run.json").read_text(encoding="utf-8"))
                decisive, of_study = about["decisive"], dict(about["settings"])
                key = int(decisive["seed"]), str(decisive["method"]), str(decisive["arm"])
                own = {name: value for name, value in decisive.items() if name not in _OF_RUN}
            if not shared:
                shared, first, settings = own, run, of_study
            for name, value in own.items():
                if shared.get(name) != value:
                    raise ValueError(
                        f"{run} is no run of the study in {first}: its {name} is {value}, there {shared.get(name)}"
                    )
            if key in found:
                raise ValueError(f"{run} and {found[key]} are the same run: pool one of them")
            found[key] = run
    results = Results()
    wins: dict[tuple[str, str], dict[int, list[float]]] = {}
    for (seed, method, arm), run in sorted(found.items()):
        with reading(run):
            results.points += points_of(run)
            lines = json_lines(run / "answers.jsonl")
            last = max((int(line["step"]) for line in lines), default=0)
            won = [float(line["win"]) for line in lines if line["step"] == last and line["win"] is not None]
        if won:
            wins.setdefault((method, arm), {})[seed] = won
    return Pool(results, settings, wins, found)
