"""What a training run shows and writes: its progress, metrics.jsonl and a plot; and how Ctrl-C ends it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["Report", "plot", "read_log", "read_object"]

_PANELS = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
# of the engine, not of the model
_LEFT_OUT = ("_runtime", "_per_second", "_preparation_time", "epoch")


class Report(TrainerCallback):
    """Writes what is logged, a JSON row each, and shows loss and margin: in a bar, or as lines where output is a pipe.

    As a context, it also makes Ctrl-C end the run after the step at hand, with a checkpoint; a second one ends it at
    once.
    """

    def __init__(self, log: Path, accelerator: Any) -> None:
        self._log, self._accelerator = log, accelerator
        self.console = Console(quiet=not accelerator.is_main_process)
        self._bar = Progress(
            *(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[now]}"),
            ),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.interrupted = False

    def __enter__(self) -> Report:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        self._bar.stop()

    def _note(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.start()
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, now="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if args.world_size > 1:
            # one rank may hear of it before the others
            noted = torch.tensor(float(self.interrupted), device=args.device)
            self.interrupted = bool(self._accelerator.reduce(noted, "sum") > 0)
        if last or self.interrupted:
            control.should_save, control.should_training_stop = True, True
            control.should_evaluate = control.should_evaluate or (last and args.eval_strategy != "no")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        split = "train" if "loss" in logs else "eval"
        numbers = {name.removeprefix("eval_"): value for name, value in logs.items() if not name.endswith(_LEFT_OUT)}
        if "loss" not in numbers or "train_loss" in numbers:
            return
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": state.global_step, "split": split, **numbers}) + "\n")
        margin, accuracy = (numbers.get(f"rewards/{name}") for name in ("margins", "accuracies"))
        now = f"loss {numbers['loss']:.4f}" + ("" if margin is None else f"  margin {margin:+.3f}")
        if split == "train":
            self._bar.update(self._task, completed=state.global_step, now=now)
        every = max(1, state.max_steps // 10)
        if split == "eval" or (state.global_step % every == 0 and not self.console.is_terminal):
            right = "" if accuracy is None or split == "train" else f"  reward accuracy {accuracy:.2f}"
            self.console.print(f"step {state.global_step:4d}  {'held-out ' if split == 'eval' else ''}{now}{right}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.stop()


def read_log(log: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a crash cut off is left out, and so is a file that is not there.

    Raises:
        ValueError: another line is no row.
    """
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{log}: line {number} is not JSON") from None
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{log}: line {number} holds no step")
        rows.append(row)
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a run wrote into a file.

    Raises:
        ValueError: it is another thing.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} can't be read: it is not what a run writes")
    return found


def plot(log: Path, image: Path, title: str) -> None:
    """Draw loss, reward accuracy and margin over the steps of a metrics.jsonl, training and held-out, if it has any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_log(log)
    if not rows:
        return
    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(13, 3.6), layout="constrained")
    for axis, (name, label) in zip(axes, _PANELS.items(), strict=True):
        for split, style in (("train", "-"), ("eval", "o-")):
            known = [row for row in rows if row.get("split") == split and isinstance(row.get(name), float | int)]
            points = [(row["step"], row[name]) for row in known]
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
