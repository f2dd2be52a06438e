"""The training loop of ``fused-po train``."""

from __future__ import annotations

import argparse
import json
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fused_po import LossOutput, linear_loss, losses
from fused_po.cli.checkpoint import load_checkpoint, save_checkpoint
from fused_po.cli.compare import Comparison
from fused_po.cli.inputs import SideInputs, check_trainable
from fused_po.cli.report import plot
from fused_po.ops.plain import plain_loss, rounding
from fused_po.trainers.loading import add_adapter, load_model, load_tokenizer, save_model
from fused_po.trainers.model import take_apart
from fused_po.trainers.preferences import AnswerBatch, Preferences, TokenPair, collate

__all__ = ["train"]

INTERRUPTED = 130


def train(arguments: argparse.Namespace) -> int:
    """Train as the command line says; see ``fused_po.cli.train``.

    Returns:
        0, 1 where the two paths of ``--compare`` disagree, 130 after Ctrl-C.

    Raises:
        ValueError: input that can't be trained, before anything is written.
    """
    run = _Run(arguments)
    with run.interruptible():
        return run.go()


class _Run:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.output = arguments, Path(arguments.output)
        self.console = Console()
        self.interrupted = False
        self.loss = _create_loss(arguments.loss, arguments.beta)
        check_trainable(self.loss)
        self.device = _device(arguments.device)
        files = [path for path in (arguments.data, arguments.eval_data) if path is not None]
        texts = [_strings(row) for row in Preferences.texts(arguments.data)]
        for path in files[1:]:
            Preferences.texts(path)
        self.tokenizer = load_tokenizer(arguments.model, [text for row in texts for text in row])
        model = load_model(arguments.model, self.tokenizer, arguments.seed)
        limit = min(arguments.max_length, getattr(model.config, "max_position_embeddings", arguments.max_length))
        data = [Preferences.read(path, self.tokenizer, limit, arguments.on_too_long) for path in files]
        for path, found in zip(files, data, strict=True):
            self._describe(path, found)
        self.pairs, self.held_out = data[0].pairs, data[1].pairs if len(data) > 1 else []
        self.batch_size = min(arguments.batch_size, len(self.pairs))
        model = add_adapter(model, arguments.lora, arguments.seed) if arguments.lora else model
        self.model = model.to(self.device)
        # a model that can't be taken apart is refused here
        first = self._batch(self.pairs[:1])
        with torch.no_grad():
            take_apart(self.model, input_ids=first.input_ids[:, :32], attention_mask=first.attention_mask[:, :32])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=arguments.lr, weight_decay=0.0)
        warmup = max(1, arguments.steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup))
        self.comparison: Comparison | None = None

    def go(self) -> int:
        self.output.mkdir(parents=True, exist_ok=True)
        with self._progress("reference", len(self.pairs) + len(self.held_out)) as advance:
            common = (self.batch_size, self._batch, advance)
            self.train_inputs = SideInputs(self.loss, self.model, self.pairs, *common)
            self.eval_inputs = SideInputs(self.loss, self.model, self.held_out, *common) if self.held_out else None
        first = 0
        if self.arguments.resume:
            first = load_checkpoint(self.output, self.arguments, self.model, self.optimizer, self.schedule)
            _cut_log(self.output / "metrics.jsonl", first)
        with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as log:
            done = self._steps(first, log)
        plot(self.output / "metrics.jsonl", self.output / "metrics.png", self.loss.name)
        if done < self.arguments.steps:
            self.console.print(f"stopped after step {done}: the same command with --resume continues")
            return INTERRUPTED
        code = self._report_comparison()
        save_model(self.model, self.tokenizer, self.output / "model")
        self.console.print(f"wrote {self.output}/metrics.jsonl, metrics.png and model/")
        return code

    def _steps(self, first: int, log: Any) -> int:
        """Take the steps from ``first`` on; returns how many are done in all."""
        arguments = self.arguments
        if first == 0:
            self._evaluate(0, log)
        with self._progress("training", arguments.steps, first) as advance:
            for step, indices in self._order(first):
                _write(log, {"step": step, "split": "train", **self._step(step, indices)})
                advance(1)
                last = step == arguments.steps or self.interrupted
                if step % arguments.eval_every == 0 or step == arguments.steps:
                    self._evaluate(step, log)
                if step % arguments.save_every == 0 or last:
                    log.flush()
                    save_checkpoint(self.output, step, arguments, self.model, self.optimizer, self.schedule)
                if last:
                    return step
        return first

    def _step(self, number: int, indices: Sequence[int]) -> dict[str, float]:
        batch = self._batch([self.pairs[i] for i in indices])
        inputs = self.train_inputs(indices, batch, self.model)
        metrics: dict[str, Tensor] = {}
        outputs: list[LossOutput] = []

        def fused(model: nn.Module) -> Tensor:
            out = self._loss_output(model, batch, inputs)
            out.loss.backward()
            metrics.update(out.metrics, **self._rewards(indices, batch, out, self.train_inputs))
            outputs[:] = [out]
            return out.loss.detach()

        def plain(model: nn.Module) -> Tensor:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            # what the model returns has its own softcap and scale applied
            value = plain_loss(logits[:, :-1], batch.labels, self.loss, **inputs)
            value.backward()
            return value.detach()

        def noise() -> tuple[float, float]:
            return rounding(outputs[0].stats, batch.labels, self.loss, **inputs)

        if self.arguments.compare:
            if self.comparison is None:
                self.comparison = Comparison(fused, plain, self.device)
            self.comparison.fused, self.comparison.plain = fused, plain
            loss = self.comparison.step(self.model, number, noise)
        else:
            loss = fused(self.model)
        norm = nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(f"step {number}: loss {loss.item()}, gradient norm {norm.item()}; a lower --lr?")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        found = {"loss": loss, "grad_norm": norm, "learning_rate": self.schedule.get_last_lr()[0], **metrics}
        return {name: float(value) for name, value in found.items()}

    def _loss_output(self, model: nn.Module, batch: AnswerBatch, inputs: dict[str, Any]) -> LossOutput:
        half = self.arguments.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            hidden, head, _ = take_apart(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            return linear_loss(hidden[:, :-1], head.weight, batch.labels, self.loss, **head.options, **inputs)

    def _rewards(
        self, indices: Sequence[int], batch: AnswerBatch, out: LossOutput, inputs: SideInputs
    ) -> dict[str, Tensor]:
        """Reward accuracy and margin where a loss does not log its own: rewards are log-ratios to the reference."""
        assert out.stats.logp is not None
        ratio = (out.stats.logp.double() - inputs.reference(indices, batch)).sum(1)
        chosen, rejected = ratio.chunk(2)
        margin = chosen - rejected
        own = {"rewards/accuracies": (margin > 0).double().mean(), "rewards/margins": margin.mean()}
        return {name: value for name, value in own.items() if name not in out.metrics}

    @torch.no_grad()
    def _evaluate(self, step: int, log: Any) -> None:
        if self.eval_inputs is None:
            return
        self.model.eval()
        sums: dict[str, float] = {}
        for first in range(0, len(self.held_out), self.batch_size):
            indices = range(first, min(first + self.batch_size, len(self.held_out)))
            batch = self._batch([self.held_out[i] for i in indices])
            out = self._loss_output(self.model, batch, self.eval_inputs(indices, batch, self.model))
            found = {"loss": out.loss, **out.metrics, **self._rewards(indices, batch, out, self.eval_inputs)}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(indices) / len(self.held_out)
        self.model.train()
        _write(log, {"step": step, "split": "eval", **sums})
        accuracy, margin = sums["rewards/accuracies"], sums["rewards/margins"]
        self.console.print(
            f"step {step:4d}  held-out loss {sums['loss']:.4f}  reward accuracy {accuracy:.2f}  margin {margin:+.3f}"
        )

    def _order(self, first: int) -> Iterator[tuple[int, list[int]]]:
        """Steps after ``first`` with the pairs of each: every epoch in an order of its own, that only the seed
        decides.
        """
        per_epoch = len(self.pairs) // self.batch_size
        for step in range(first + 1, self.arguments.steps + 1):
            epoch, place = divmod(step - 1, per_epoch)
            order = list(range(len(self.pairs)))
            random.Random(f"{self.arguments.seed} {epoch}").shuffle(order)
            yield step, order[place * self.batch_size : (place + 1) * self.batch_size]

    def _batch(self, pairs: Sequence[TokenPair]) -> AnswerBatch:
        return collate(pairs, self.tokenizer.pad_token_id).to(self.device)

    def _report_comparison(self) -> int:
        if self.comparison is None:
            return 0
        summary = self.comparison.summary()
        (self.output / "compare.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self.console.print(self.comparison.table())
        return 0 if self.comparison.agrees else 1

    def _describe(self, path: Path, found: Preferences) -> None:
        noticed = ", ".join(f"{count} {name}" for name, count in sorted(found.counts.items()) if count)
        self.console.print(f"{path.name}: {len(found.pairs)} pairs" + (f" ({noticed})" if noticed else ""))

    @contextmanager
    def _progress(self, title: str, total: int, done: int = 0) -> Iterator[Any]:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done)
            yield lambda count: progress.advance(task, count)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the run after the step at hand, with a checkpoint; a second one ends it at once."""

        def note(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _create_loss(name: str, beta: float | None) -> losses.Loss:
    given: dict[str, Any] = {} if beta is None else {"beta": beta}
    if name == "sft":
        given["paired"] = True
    return losses.create(name, **given)


def _strings(row: dict[str, Any]) -> list[str]:
    """All text of a pair, whichever format it has."""
    values = (row[key] for key in ("prompt", "chosen", "rejected"))
    return [t for v in values for t in ([v] if isinstance(v, str) else [str(m["content"]) for m in v])]


def _write(log: Any, row: dict[str, Any]) -> None:
    log.write(json.dumps(row) + "\n")
    log.flush()


def _cut_log(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
