"""``fused-po train`` killed at random points and resumed: the bits of the unbroken run, and nothing lost on the way."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.killing import Runs
from tests.test_train import WORDS, small_model

STEPS, EVERY = 7, 2
# what a run is given beside its files
KINDS = {
    "pairs": ["--loss", "sigmoid"],
    "adapter": ["--loss", "ipo", "--lora", "2", "--compare"],
    "answers": ["--loss", "kto", "--gradient-accumulation-steps", "2"],
    "without a reference": ["--loss", "simpo", "--gradient-checkpointing", "--save-total-limit", "2"],
}


class Killed:
    """An unbroken run, and others of the same command line that are killed."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        self.folder, self.random, self.kills = folder, random.Random(seed), 0
        rows = [{"prompt": f"Is it {w}?", "chosen": f"Yes, {w}.", "rejected": "Go away."} for w in WORDS]
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.runs = Runs(folder)
        self.given = ["train", "--model", small_model(folder), "--data", str(data), "--eval-data", str(data)]
        self.given += ["--batch-size", "2", "--steps", str(STEPS), "--save-every", str(EVERY), "--eval-every", "3"]
        self.given += ["--lr", "1e-2", *KINDS[kind]]
        code, self.seconds, self.events = self.runs.run([*self.given, "--output", str(folder / "whole")])
        assert code == 0, self.runs.said()

    def broken_run(self, kills: int) -> None:
        """Kill a run so many times, resume it each time, and compare its end with that of the unbroken one."""
        output, kept, wanted = self.folder / "broken", 0, self.kills + kills
        self.clear(output)
        while self.kills < wanted:
            if self._cut(output):
                self.kills += 1
                kept = self._check(output, kept)
            else:
                # it came to its end
                shutil.rmtree(output)
                kept = 0
        self.end(output)

    def at_each(self, kind: str) -> int:
        """Kill a run at each event of a kind, also in its caches, and resume it; how many there were."""
        output = self.folder / "broken"
        self.clear(output)
        code, _, count = self.runs.run(self._command(output), kinds=(kind,))
        assert code == 0, self.runs.said()
        for number in range(1, count + 1):
            self.clear(output)
            code, *_ = self.runs.run(self._command(output), event=number, kinds=(kind,))
            assert code == -9, self.runs.said()
            self._check(output, 0)
            self.end(output)
        return count

    def clear(self, output: Path) -> None:
        """The caches go as well: mapping and the reference may be cut off, too."""
        for one in (output, self.folder / "cache"):
            shutil.rmtree(one, ignore_errors=True)

    def end(self, output: Path) -> None:
        """Let a run come to its end, which must be that of the unbroken one."""
        code, *_ = self.runs.run(self._command(output))
        said = self.runs.said()
        assert code == 0 or (code == 2 and f"has taken {STEPS} steps" in said), said
        self._same(output)

    def _command(self, output: Path) -> list[str]:
        resume = ["--resume"] * (output / "settings.json").exists()
        return [*self.given, "--output", str(output), *resume]

    def _cut(self, output: Path) -> bool:
        """Start or resume a run: whether it was killed before it came to its end."""
        draw = self.random
        delay = draw.choice([0.0, draw.uniform(1e-5, 2e-3)])
        where = {"event": draw.randint(1, self.events), "delay": delay}
        where = where if draw.random() < 0.7 else {"seconds": draw.uniform(0, self.seconds)}
        code, *_ = self.runs.run(self._command(output), **where)
        said = self.runs.said()
        assert code in (0, -9) or (code == 2 and f"has taken {STEPS} steps" in said), said
        return code == -9

    def _check(self, output: Path, before: int) -> int:
        """The last checkpoint: whole, not older than before, and not older than what was logged allows."""
        steps = [int(one.name.rpartition("-")[2]) for one in output.glob("checkpoint-*")]
        last = max(steps, default=0)
        logged = [json.loads(line) for line in _whole_lines(output / "metrics.jsonl")]
        reached = max((row["step"] for row in logged), default=0)
        assert last >= EVERY * ((reached - 1) // EVERY), (last, reached)
        if last:
            folder = output / f"checkpoint-{last}"
            assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == last
            assert load_file(next(folder.glob("*.safetensors")))
            assert torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        if (output / "settings.json").exists():
            assert last >= before or not before, (last, before)
            assert json.loads((output / "settings.json").read_text())["world_size"] == 1
        return last

    def _same(self, output: Path) -> None:
        whole = self.folder / "whole"
        ours, theirs = (_weights(folder / "model") for folder in (output, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert _rows(output / "metrics.jsonl") == _rows(whole / "metrics.jsonl")
        if (whole / "compare.json").exists():
            found, wanted = (json.loads((folder / "compare.json").read_text()) for folder in (output, whole))
            assert [row["step"] for row in found["rows"]] == [row["step"] for row in wanted["rows"]]
        assert not list(output.glob(".incomplete*")), list(output.iterdir())


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _whole_lines(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")] if log.exists() else []


def _rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_killed_run_ends_as_the_unbroken_one(tmp_path):
    runs = Killed(tmp_path, "pairs", seed=0)
    runs.broken_run(3)
    assert runs.kills == 3


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_kills(tmp_path, kind):
    """25 of each kind, five a run."""
    runs = Killed(tmp_path, kind, seed=len(kind))
    for _ in range(5):
        runs.broken_run(5)
    assert runs.kills == 25


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["pairs", "answers"])
def test_a_kill_at_each_renaming(tmp_path, kind):
    """Of data that is mapped, the reference, settings, checkpoints, the log and the model."""
    assert Killed(tmp_path, kind, seed=0).at_each("os.rename") > STEPS // EVERY
