"""Runs of one study, wherever they stand: those of several output folders are taken together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_po.study.reading import reading
from fused_po.study.real_run import measured, points_of
from fused_po.study.real_settings import NAMES, RealSettings, arms_of
from fused_po.study.run import Results
from fused_po.trainers.whole import json_lines

__all__ = ["Pool", "pooled"]

# of a run, and not of the study that it is one of
_OF_RUN = ("seed", "method", "arm")


@dataclass(frozen=True)
class Pool:
    """Runs with the same settings on the same data.

    Attributes:
        results: their numbers, those of runs that are not finished too.
        settings: that they share.
        wins: (method, arm) -> seed -> how often the final answer wins, for each held-out prompt; of finished runs.
        runs: (seed, method, arm), each with the folder that it stands in.
        unfinished: those among them that lack numbers, with the last update after which they have any.
        mixed: what may differ between them and does: name -> values.
    """

    results: Results
    settings: dict[str, Any]
    wins: dict[tuple[str, str], dict[int, list[float]]]
    runs: dict[tuple[int, str, str], Path]
    unfinished: dict[tuple[int, str, str], int]
    mixed: dict[str, list[str]]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for seed, _, _ in self.runs})

    def finished(self) -> Results:
        """The numbers of finished runs alone: others would be compared at another time of their training."""
        return Results([one for one in self.results.points if (one.seed, one.method, one.arm) not in self.unfinished])

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
    free: dict[str, set[str]] = {}
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
                for name, value in (("fused_po", about["version"]), ("dtype", of_study["dtype"])):
                    free.setdefault(name, set()).add(str(value))
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
    unfinished = {}
    with reading(first / "run.json"):
        due = set(RealSettings(**settings).due)
    for (seed, method, arm), run in sorted(found.items()):
        with reading(run):
            points = points_of(run)
            results.points += points
            kinds = ("held_out", "G") if arm == "full" else ("held_out",)
            if not all(due <= measured(run, kind) for kind in kinds):
                unfinished[seed, method, arm] = max((one.step for one in points), default=0)
                continue
            lines = json_lines(run / "answers.jsonl")
            won = [float(one["win"]) for one in lines if one["step"] == max(due) and one["win"] is not None]
        if won:
            wins.setdefault((method, arm), {})[seed] = won
    mixed = {name: sorted(values) for name, values in free.items() if len(values) > 1}
    return Pool(results, settings, wins, found, unfinished, mixed)
