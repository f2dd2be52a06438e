"""Folders of studies, which more seeds are added to, or which are pooled; files of rollouts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fused_po.diagnostics.rollouts import is_rollouts, read_rollouts, write_rollouts
from fused_po.study.real_pool import pooled
from fused_po.study.run import Bin, Point, Results
from fused_po.study.store import Store
from tests.fuzz.readers.common import Target, files_of, lazily, refusing, replaced

__all__ = ["STUDIES"]

SETTINGS: dict[str, Any] = {"steps": 3, "beta": 0.1, "device": "cpu"}


def kept() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name), SETTINGS)
        store.open()
        store.write(
            7, Results([Point(7, "dpo", "full", 0, "G", 0.5)], [Bin(7, "dpo", 0, "positive", 0.0, 1.0, 2.0)]), 1.5
        )
        return files_of(Path(name))


def run_files() -> dict[str, bytes]:
    about = {"decisive": {"seed": 0, "method": "dpo", "arm": "full", "data": "x"}, "settings": {"beta": 0.1}}
    folder = "seed-0/dpo/full"
    line = {"seed": 0, "method": "dpo", "arm": "full", "step": 0, "values": {"G": 0.5}}
    answer = {"step": 0, "win": 0.5}
    found = {"run.json": about, "points.jsonl": line, "answers.jsonl": answer}
    return {f"{folder}/{name}": json.dumps(content).encode() + b"\n" for name, content in found.items()}


kept_files = lazily(kept)


def store(data: bytes, folder: Path) -> None:
    """A study with one seed, a file of it broken."""
    replaced(kept_files(), data, folder / "study")
    with refusing(ValueError, str(folder)):
        found = Store(folder / "study", SETTINGS)
        found.check()
        found.open()
        results, seconds = found.read(found.seeds())
        assert isinstance(seconds, float) and all(isinstance(point.value, float) for point in results.points)


def pool(data: bytes, folder: Path) -> None:
    """A run of a study on a pretrained model, a file of it broken."""
    replaced(run_files(), data, folder / "study")
    with refusing(ValueError, str(folder)):
        found = pooled([folder / "study"])
        assert all(isinstance(point.value, float | int) for point in found.results.points)
        assert all(
            isinstance(win, float | int) for seeds in found.wins.values() for won in seeds.values() for win in won
        )


def rollouts(data: bytes, folder: Path) -> None:
    path = folder / "rollouts.jsonl"
    path.write_bytes(data)
    known = is_rollouts(path)
    with refusing(ValueError, str(path)):
        found = read_rollouts(path, vocabulary=50)
        assert known or not data.lstrip().startswith(b'{"prompt_ids"')
        batches = [one for one in found if one.answer_ids]
        assert all(0 <= token < 50 for one in batches for token in (*one.prompt_ids, *one.answer_ids))
        write_rollouts(path, found)
        assert read_rollouts(path) == found


ROLLOUT = b'{"prompt_ids": [1, 5], "answer_ids": [7, 2], "old_logps": [-0.5, -1.25], "advantage": 0.7, "step": 40}\n'
BROKEN = tuple(
    bytes([file, way]) + rest for file in range(4) for way in range(3) for rest in (b"{}", b"[]\n", b"\x00\x09\x01x")
)
STUDIES = {
    "store": Target(store, BROKEN, ('"steps"', "null", "seed,", ",,", "\n")),
    "rollouts": Target(
        rollouts,
        (ROLLOUT, ROLLOUT * 2, b'{"prompt_ids": [1], "answer_ids": [], "mask": []}\n' + ROLLOUT, b"[" * 4000),
        ('"mask"', '"ref_logps"', '"step"', "1e400", "NaN", "true", "null", "[", "-1"),
    ),
    "pool": Target(pool, BROKEN, ('"decisive"', '"settings"', '"seed"', '"values"', '"win"', "null")),
}
