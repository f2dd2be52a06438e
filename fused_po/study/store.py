"""A study's folder while it grows: its settings, and a folder for each seed that is done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_po.study.reading import reading
from fused_po.study.report import read_results, write_results
from fused_po.study.run import Results
from fused_po.trainers.whole import write_text

__all__ = ["Store"]


@dataclass(frozen=True)
class Store:
    """Results by seed, each written whole or not at all.

    Attributes:
        folder: the study's.
        settings: what all its seeds share.
    """

    folder: Path
    settings: Mapping[str, Any]

    def open(self) -> None:
        """Make the folder, or find it as an earlier start with the same settings left it.

        Raises:
            ValueError: it holds something else, or seeds of other settings.
        """
        known = self._known()
        if known is None:
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ValueError(f"{self.folder} exists and is neither empty nor a study")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "settings.json", json.dumps(dict(self.settings), indent=1) + "\n")
        else:
            self._compare(known)

    def check(self) -> None:
        """Whether the folder is a study of these settings.

        Raises:
            ValueError: it is not.
        """
        known = self._known()
        if known is None:
            raise ValueError(f"{self.folder} is no study: it holds no settings.json")
        self._compare(known)

    def seeds(self) -> list[int]:
        """Those that are done."""
        return sorted(int(one.name) for one in (self.folder / "seeds").glob("*") if one.name.isdecimal())

    def write(self, seed: int, results: Results, seconds: float) -> None:
        """Keep the results of a seed and the processor time that it took."""
        (self.folder / "seeds").mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder / "seeds"))
        try:
            write_results(results, made)
            (made / "seconds.txt").write_text(f"{seconds:.1f}\n", encoding="utf-8")
            os.replace(made, self.folder / "seeds" / str(seed))
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def read(self, seeds: Iterable[int]) -> tuple[Results, float]:
        """The results of seeds, and the processor time that they took."""
        results, seconds = Results(), 0.0
        for seed in seeds:
            own = self.folder / "seeds" / str(seed)
            with reading(own):
                results += read_results(own)
                seconds += float((own / "seconds.txt").read_text(encoding="utf-8"))
        return results, seconds

    def _known(self) -> Mapping[str, Any] | None:
        path = self.folder / "settings.json"
        if not path.exists():
            return None
        with reading(path):
            known: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known.keys()
        return known

    def _compare(self, known: Mapping[str, Any]) -> None:
        differ = [name for name in (*self.settings, *known) if known.get(name) != self.settings.get(name)]
        if differ:
            name = differ[0]
            raise ValueError(
                f"{self.folder} holds a study of other settings: {name} is {known.get(name)} there, "
                f"{self.settings.get(name)} here"
            )
