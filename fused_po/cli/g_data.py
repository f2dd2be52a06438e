"""What ``fused-po g`` measures on: D from preferences or rollouts, D' from the last checkpoint or a file."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_po.diagnostics.examples import Examples
from fused_po.diagnostics.rollouts import Rollout, at_step, is_rollouts, read_rollouts, rollout_examples
from fused_po.losses import Loss
from fused_po.losses.batch import OPTIONAL, SIDE_INPUTS
from fused_po.trainers.batches import collate, mismatched
from fused_po.trainers.data import PreferenceError, counted, load_preferences
from fused_po.trainers.model import token_stats_of
from fused_po.trainers.preferences import check_trainable, learns_single

__all__ = ["Data", "answers_of_file", "check_loss", "drawn", "load", "on_device"]

# side inputs that a file of rollouts holds
_OF_ROLLOUTS = frozenset({"advantage", "old_logp", "ref_logp"})


@dataclass
class Data:
    """D, tokenized, and what turns it into examples for a loss.

    Attributes:
        rows: of preferences, with ``ids``, ``starts``, ``signs``; or None.
        rollouts: of a dump; or None.
        prompts: token ids, each once, in the order of D.
        said: about the file, in words.
    """

    rows: list[dict[str, Any]] | None
    rollouts: list[Rollout] | None
    prompts: list[list[int]]
    said: str
    loss: Loss
    pad: int
    batch_size: int

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model has to be asked."""
        return self.rows is not None and bool(self.loss.needs & {"ref_logp", "old_logp", "kl"})

    def refer(self, model: nn.Module, advance: Callable[[float], Any] = lambda done: None) -> None:
        """Keep the reference's log-probs of each answer beside its row; ``advance`` is told which share is done."""
        assert self.rows is not None
        if "kl" in self.loss.needs:
            self.rows = [row | mismatched(self.rows, place) for place, row in enumerate(self.rows)]
        prefixes, batches = ("", "other_") if "kl" in self.loss.needs else ("",), self._cut(self.rows)
        for place, prefix in enumerate(prefixes):
            for number, rows in enumerate(batches, 1):
                logp, keep = self._logp(model, rows, prefix)
                found = [one[mask].tolist() for one, mask in zip(logp, keep, strict=True)]
                for index, row in enumerate(rows):
                    row[f"{prefix}ref"] = found[index :: len(rows)]
                advance((place + number / len(batches)) / len(prefixes))

    def examples(self, model: nn.Module, step: int) -> list[Examples]:
        """D at a checkpoint: rollouts that its policy drew, or the preferences."""
        if self.rollouts is not None:
            chosen = at_step(self.rollouts, step)
            found = rollout_examples(chosen, self.pad, self.loss.needs, batch_size=self.batch_size)
            return [on_device(one, _device(model)) for one in found]
        assert self.rows is not None
        shift, batches = self._shift(model), []
        for rows in self._cut(self.rows):
            batch = collate(rows, self.pad)
            made = {"advantage": batch["signs"].float(), "desirable": batch["signs"] > 0, **shift}
            made |= {name: batch["ref_logp"] for name in ("ref_logp", "old_logp") if "ref_logp" in batch}
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            side = {name: value for name, value in made.items() if name in self.loss.needs}
            batches.append(on_device(Examples(inputs, batch["labels"], side), _device(model)))
        return batches

    def shapes(self) -> list[Examples]:
        """D with made-up numbers, for a prediction."""
        if self.rollouts is not None:
            return rollout_examples(self.rollouts, self.pad, self.loss.needs, batch_size=self.batch_size)
        assert self.rows is not None
        found = []
        for rows in self._cut(self.rows):
            batch = collate(rows, self.pad)
            count = len(batch["signs"])
            made = {"advantage": torch.ones(count), "desirable": batch["signs"] > 0, "kl": torch.zeros(())}
            made |= {name: torch.zeros(batch["labels"].shape) for name in ("ref_logp", "old_logp")}
            side = {name: value for name, value in made.items() if name in self.loss.needs}
            found.append(Examples({n: batch[n] for n in ("input_ids", "attention_mask")}, batch["labels"], side))
        return found

    def _cut(self, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Batches of about as many answers as were asked for, of rows of about one length."""
        size = max(1, self.batch_size // len(rows[0]["ids"]))
        ordered = sorted(rows, key=lambda row: max(map(len, row["ids"])))
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]

    def _shift(self, model: nn.Module) -> dict[str, Any]:
        """KTO's reference point at the policy, over the whole of D."""
        if "kl" not in self.loss.needs:
            return {}
        assert self.rows is not None
        total, count = 0.0, 0
        for rows in self._cut(self.rows):
            logp, _ = self._logp(model, rows, "other_")
            batch = collate(rows, self.pad, "other_")
            total += (logp.double() - batch["other_ref_logp"]).sum().item()
            count += len(logp)
        return {"kl": torch.tensor(max(total / count, 0.0))}

    def _logp(self, model: nn.Module, rows: Sequence[dict[str, Any]], prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the answers' tokens, and which positions hold one."""
        batch = {name: value.to(_device(model)) for name, value in collate(rows, self.pad, prefix).items()}
        inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
        targets = batch[f"{prefix}labels"]
        with torch.no_grad():
            logp = token_stats_of(model, inputs, targets).logp
        assert logp is not None
        return logp.float().cpu(), (targets >= 0).cpu()


def check_loss(loss: Loss, source: str) -> None:
    """Whether a source of D holds what a loss reads.

    Raises:
        ValueError: it does not.
    """
    if not is_rollouts(source):
        check_trainable(loss)
        return
    missing = sorted((loss.needs & SIDE_INPUTS) - OPTIONAL - _OF_ROLLOUTS)
    if missing or loss.horizon == "pair":
        why = f"it reads {', '.join(missing)}" if missing else "it compares pairs"
        raise ValueError(f"loss {loss.name!r} is none of rollouts: {why}")


def load(
    source: str,
    tokenizer: Any,
    loss: Loss,
    *,
    examples: int,
    batch_size: int,
    max_length: int,
    vocabulary: int,
    seed: int,
) -> Data:
    """Read D.

    Args:
        examples: rows (pairs, or single answers) at most, drawn by ``seed``; of rollouts, answers of each step.

    Raises:
        ValueError: what can't be read or used.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if is_rollouts(source):
        rollouts = read_rollouts(source, vocabulary=vocabulary)
        by_step: dict[int | None, list[Rollout]] = {}
        for one in rollouts:
            by_step.setdefault(one.step, []).append(one)
        rollouts = [one for step in by_step for one in _some(by_step[step], examples, seed)]
        said = f"{len(rollouts)} rollouts of {len(by_step)} steps"
        return Data(None, rollouts, _once([one.prompt_ids for one in rollouts]), said, loss, pad, batch_size)
    single = learns_single(loss)
    options: dict[str, Any] = {"single": single, "max_length": max_length, "vocabulary": vocabulary}
    read = load_preferences(source, tokenizer, **options)
    rows = list(read.rows)
    chosen = _some(rows, examples, seed)
    prompts = _once([row["ids"][0][: row["starts"][0]] for row in chosen])
    said = f"{len(chosen)} of {len(rows)} rows" + (f" ({counted(read.counts)})" if read.counts else "")
    return Data(chosen, None, prompts, said, loss, pad, batch_size)


def _some(rows: list[Any], count: int, seed: int) -> list[Any]:
    if len(rows) <= count:
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _once(prompts: Sequence[list[int]]) -> list[list[int]]:
    return [list(one) for one in dict.fromkeys(map(tuple, prompts)) if one]


@torch.no_grad()
def drawn(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    sampled: bool,
    seed: int,
    longest: int,
    batch_size: int,
    advance: Callable[[int], Any] = lambda done: None,
) -> list[Rollout]:
    """Answers of a model to prompts: greedy, or sampled from the model's own distribution at temperature 1."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    found: list[Rollout] = []
    torch.manual_seed(seed)
    options = {"do_sample": sampled, "max_new_tokens": longest, "pad_token_id": pad, "num_beams": 1}
    options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    for first in range(0, len(prompts), batch_size):
        rows = prompts[first : first + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=_device(model))
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=_device(model))
        answers = model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
        for row, answer in zip(rows, answers.tolist(), strict=True):
            end = tokenizer.eos_token_id
            kept = answer[: answer.index(end) + 1] if end in answer else answer
            found.append(Rollout(list(row), kept))
        advance(len(found))
    return found


def answers_of_file(path: str, tokenizer: Any, max_length: int, vocabulary: int) -> list[Rollout]:
    """D' from a file: rollouts, or rows of ``prompt`` and ``completion`` in any form that preferences have.

    Raises:
        ValueError: what can't be read or used.
    """
    if is_rollouts(path):
        return read_rollouts(path, vocabulary=vocabulary)
    try:
        # other separators of lines may stand in strings
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--final {path}: neither greedy nor sampled, nor a file of JSON lines ({error})") from None
    if not rows or not all(isinstance(row, dict) and "completion" in row for row in rows):
        raise ValueError(f"--final {path}: each line wants prompt and completion, or prompt_ids and answer_ids")
    with tempfile.TemporaryDirectory() as folder:
        labelled = Path(folder) / Path(path).name
        labelled.write_text("".join(json.dumps(row | {"label": True}) + "\n" for row in rows), encoding="utf-8")
        options: Mapping[str, Any] = {"single": True, "max_length": max_length, "vocabulary": vocabulary}
        try:
            found = load_preferences(str(labelled), tokenizer, **options)
        except PreferenceError as error:
            raise ValueError(f"--final {str(error).replace(str(labelled), path)}") from None
        return [
            Rollout(row["ids"][0][: row["starts"][0]], row["ids"][0][row["starts"][0] :]) for row in list(found.rows)
        ]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def on_device(examples: Examples, device: torch.device) -> Examples:
    """Examples with all tensors there."""

    def moved(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value.to(device) for name, value in values.items()}

    return Examples(moved(examples.inputs), examples.labels.to(device), moved(examples.side_inputs))
