"""The runs of a study on a pretrained model: a folder for each seed, method and arm, where another start goes on."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fused_po
from fused_po.study.reading import reading
from fused_po.study.real_data import Pairs, read_pairs
from fused_po.study.real_g import g_of_run
from fused_po.study.real_measure import Measure, write_outputs
from fused_po.study.real_model import Speaker, load
from fused_po.study.real_reward import load_judge, load_reward
from fused_po.study.real_settings import NAMES, RealSettings, folder_of
from fused_po.study.real_train import checkpoints, train
from fused_po.study.run import Point
from fused_po.trainers import loading, whole
from fused_po.trainers.data import load_preferences, texts

__all__ = ["RealStudy", "claim", "measured", "points_of"]

# what is said, and how much of a run is done, in [0, 1]
Say = Callable[[str, float], None]
# of a run's time, on the way to its last update
TRAINING = 0.6


class RealStudy:
    """A study of a pretrained model on preference pairs.

    Args:
        settings: placed on a device.
        output: a folder.

    Raises:
        ValueError: a model, data, reward or judge that can't be used; before anything is trained.
    """

    def __init__(self, settings: RealSettings, output: Path) -> None:
        self.settings, self.output = settings, output
        self.reward = None if settings.reward is None else load_reward(settings.reward, settings.device or "cpu")
        judge = None if settings.judge is None else load_judge(settings.judge)
        words = texts(settings.data) if settings.model == "tiny" else []
        self.tokenizer = loading.load_tokenizer(settings.model, words)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {settings.model!r} has no end-of-sequence token")
        self.pairs = read_pairs(
            settings.data, settings.held_out, settings.eval_data, template=bool(self.tokenizer.chat_template)
        )
        self._now = {"data": _digest(self.pairs), **settings.decisive()}
        claim(output / "study.json", self._now, {"version": fused_po.__version__, "settings": asdict(settings)})
        # the random model is one of a folder, too
        self._start = str(output / "start") if settings.model == "tiny" else settings.model
        start = loading.load_model(settings.model, self.tokenizer, 0)
        self.pairs.write(output / "data")
        if settings.model == "tiny":
            start.save_pretrained(self._start)
            self.tokenizer.save_pretrained(self._start)
        limit = min(settings.max_length, getattr(start.config, "max_position_embeddings", None) or settings.max_length)
        options = {"max_length": limit, "vocabulary": start.get_input_embeddings().weight.shape[0]}
        self._rows = {
            name: load_preferences(str(output / "data" / f"{name}.jsonl"), self.tokenizer, **options).rows
            for name in ("train", "held_out")
        }
        speaker = Speaker(self.tokenizer, limit - settings.max_new_tokens, settings.max_new_tokens)
        rows = self._rows["train"]
        shown = {"train": rows.select(range(min(len(rows), settings.held_out))), "held_out": self._rows["held_out"]}
        self.measure = Measure(settings, speaker, start.eval(), shown, self.pairs.held_out, self.reward, judge)
        self._at_start: dict[int, dict[str, float]] = {}

    def run(self, seed: int, method: str, arm: str, say: Say) -> None:
        """Train and measure an arm, or what is left of it.

        Raises:
            ValueError: the folder of the run holds one with other settings.
            FloatingPointError: the training diverged.
        """
        settings, folder = self.settings, self.output / folder_of(seed, method, arm)
        about = {"version": fused_po.__version__, "settings": asdict(settings)}
        claim(folder / "run.json", {"seed": seed, "method": method, "arm": arm, **self._now}, about)
        done = {kind: measured(folder, kind) for kind in ("held_out", "G")}
        left = set(settings.due) - done["held_out"]
        g_left = arm == "full" and bool(set(settings.due) - done["G"])
        if not left and not g_left:
            return
        name = f"seed {seed}, {NAMES[method]}, {arm}"
        trained = replace(settings, model=self._start)
        train(
            trained,
            seed,
            method,
            arm,
            folder,
            tokenizer=self.tokenizer,
            pairs=self._rows["train"],
            prompts=self.pairs.train,
            reward=self.reward,
            say=lambda step: say(f"{name}: update {step} of {settings.steps}", TRAINING * step / settings.steps),
        )
        models = {0: None, **checkpoints(folder)}
        whole.begin_lines(folder / "points.jsonl")
        run = {"seed": seed, "method": method, "arm": arm}

        def write(step: int, values: dict[str, float]) -> None:
            whole.add_line(folder / "points.jsonl", {**run, "step": step, "values": values})

        for index, step in enumerate(settings.due):
            say(f"{name}: measuring after update {step}", TRAINING + 0.2 * index / len(settings.due))
            if step in left:
                write(step, self._measured(models[step], folder, step, seed, f"{name}, update {step}"))
        if g_left:
            given = {"speaker": self.measure.speaker, "pairs": self._rows["train"], "prompts": self.pairs.train}
            found = g_of_run(
                trained,
                seed,
                method,
                {step: models[step] for step in settings.due},
                known=done["G"],
                references=self.measure.references,
                reward=self.reward,
                **given,
            )
            for index, (step, numbers) in enumerate(found):
                say(f"{name}: G after update {step}", 0.8 + 0.2 * index / len(settings.due))
                write(step, numbers)
        for step, path in models.items():
            # only the run that G is measured over is asked again
            if path is not None and arm != "full" and step != settings.steps:
                shutil.rmtree(path)

    def _measured(self, path: Path | None, folder: Path, step: int, seed: int, name: str) -> dict[str, float]:
        if path is None and seed in self._at_start:
            return self._at_start[seed]
        gc.collect()
        lora = None if path is None else self.settings.lora
        model = load(self._start, path, lora, seed, self.tokenizer).to(self.settings.device).eval()
        numbers = self.measure(model, None if path is None else folder, step, seed, name)
        if path is None:
            self._at_start[seed] = numbers
            start = self.output / f"seed-{seed}" / "start"
            start.mkdir(parents=True, exist_ok=True)
            write_outputs(start, self.measure.baseline(seed), "start")
        return numbers


def claim(path: Path, now: dict[str, Any], about: dict[str, Any]) -> None:
    """Write down what decides the numbers of a folder, or compare with what it was begun with.

    Raises:
        ValueError: something else.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(path, json.dumps({"decisive": now, **about}, indent=1) + "\n")
        return
    with reading(path):
        before = dict(json.loads(path.read_text(encoding="utf-8"))["decisive"])
    for name, value in now.items():
        if before.get(name) != value:
            was = "other data" if name == "data" else f"{name} {before.get(name)}, now it is {value}"
            raise ValueError(f"{path.parent} was begun with {was}: give another --output")


def measured(folder: Path, kind: str) -> set[int]:
    """The updates of a run after which ``held_out`` numbers, or ``G``, are known."""
    metric = "dpo_loss/held_out" if kind == "held_out" else "G"
    return {line["step"] for line in whole.json_lines(folder / "points.jsonl") if metric in line["values"]}


def points_of(folder: Path) -> list[Point]:
    """The numbers of a run."""
    return [
        Point(int(line["seed"]), line["method"], line["arm"], int(line["step"]), name, float(value))
        for line in whole.json_lines(folder / "points.jsonl")
        for name, value in line["values"].items()
    ]


def _digest(pairs: Pairs) -> str:
    found: Sequence[Any] = [pairs.train, pairs.held_out]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
