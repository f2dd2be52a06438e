"""What a training run shows and writes: its progress, metrics.jsonl and a plot; and how Ctrl-C ends it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback

from fused_po.cli.progress import QUIET_LATER
from fused_po.pictures import png
from fused_po.trainers import whole

__all__ = ["Bar", "Report", "plot", "rows"]

_PANELS = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
# of the engine, not of the model
_LEFT_OUT = ("_runtime", "_per_second", "_preparation_time", "epoch", "step")


class Bar(ProgressCallback):
    """The engine's bar, with the loss and margin of the last step behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(_words(logs))


class Report(TrainerCallback):
    """Writes metrics.jsonl, and a line for each evaluation and, where there is no bar, each tenth of the steps, or
    more where these take long.

    As a context, it also makes Ctrl-C end the run after the step at hand, with a checkpoint; a second one ends it at
    once. Ranks agree on the step.
    """

    def __init__(self, log: Path, accelerator: Any, bar: Bar | None) -> None:
        self._log, self._accelerator, self._bar = log, accelerator, bar
        self._asked = self.interrupted = False
        self._said = time.monotonic()

    def __enter__(self) -> Report:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        bar: Any = self._bar
        if bar is not None and bar.training_bar is not None:
            # training that raised left it open, and what is said next would stand behind it
            bar.training_bar.close()

    def _note(self, number: int, frame: Any) -> None:
        # that another rank was asked before is no second time
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # of a run that is continued, the checkpoint holds what was logged until then
            whole.write_text(self._log, _lines(rows(state.log_history)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        self.interrupted = self._asked
        if args.world_size > 1:
            asked = torch.tensor(float(self._asked), device=args.device)
            self.interrupted = bool(self._accelerator.reduce(asked, "sum") > 0)
        if last or self.interrupted:
            control.should_save, control.should_training_stop = True, True
            control.should_evaluate = control.should_evaluate or (last and args.eval_strategy != "no")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        found = rows(state.log_history[-1:])
        if not state.is_world_process_zero or not found:
            return
        with whole.writing(str(self._log)), self._log.open("a", encoding="utf-8") as log:
            log.write(_lines(found))
        (row,), every = found, max(1, state.max_steps // 10)
        due = state.global_step % every == 0 or time.monotonic() - self._said >= QUIET_LATER
        if row["split"] == "eval" or (self._bar is None and due):
            self._said = time.monotonic()
            held_out = "held-out " if row["split"] == "eval" else ""
            bar: Any = self._bar
            say = print if bar is None else bar.training_bar.write
            say(f"step {state.global_step:4d}  {held_out}{_words(row, accuracy=bool(held_out))}")


def rows(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What metrics.jsonl holds of an engine's ``log_history``: the steps that were trained and evaluations."""
    found = []
    for logs in history:
        numbers = {name.removeprefix("eval_"): value for name, value in logs.items() if not name.endswith(_LEFT_OUT)}
        if "loss" in numbers and "train_loss" not in numbers:
            found.append({"step": logs["step"], "split": "train" if "loss" in logs else "eval", **numbers})
    return found


def plot(found: Sequence[dict[str, Any]], image: Path, title: str) -> None:
    """Draw loss, reward accuracy and margin over the steps, training and held-out, if there are any."""
    from matplotlib.figure import Figure

    if not found:
        return
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        for split, style in (("train", "-"), ("eval", "o-")):
            points = [(row["step"], row[name]) for row in found if row["split"] == split and name in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, label="held-out" if split == "eval" else split)
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    image.write_bytes(png(figure))


def _words(numbers: dict[str, Any], accuracy: bool = False) -> str:
    shown = {"loss": "loss {:.4f}", "rewards/margins": "margin {:+.3f}"}
    shown |= {"rewards/accuracies": "reward accuracy {:.2f}"} if accuracy else {}
    return "  ".join(words.format(numbers[name]) for name, words in shown.items() if name in numbers)


def _lines(found: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)
