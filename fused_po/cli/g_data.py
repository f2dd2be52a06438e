"""What ``fused-po g`` measures on: D from preferences or rollouts, D' from the last checkpoint or a file."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_po.diagnostics.examples import Examples
from fused_po.diagnostics.rollouts import Rollout, at_step, is_rollouts, read_rollouts, rollout_examples
from fused_po.losses import Loss
from fused_po.losses.batch import OPTIONAL, SIDE_INPUTS
from fused_po.trainers.answers import answers_to
from fused_po.trainers.batches import answers_of, collate, mismatched
from fused_po.trainers.data import PreferenceError, counted, load_preferences
from fused_po.trainers.model import token_stats_of
from fused_po.trainers.preferences import check_trainable, learns_single, reads_reference, side_inputs_of
from fused_po.trainers.references import keep_reference

__all__ = ["Data", "answers_of_file", "check_loss", "drawn", "load"]

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
        return self.rows is not None and reads_reference(self.loss)

    def refer(self, model: nn.Module, advance: Callable[[float], Any] = lambda done: None) -> None:
        """Keep the reference's log-probs of each answer beside its row; ``advance`` is told which share is done."""
        assert self.rows is not None
        if "kl" in self.loss.needs:
            self.rows = [row | mismatched(self.rows, place) for place, row in enumerate(self.rows)]
        batches = self._cut(self.rows)
        for number, rows in enumerate(batches, 1):
            keep_reference(rows, self.pad, partial(_log_probs, model))
            advance(number / len(batches))

    def examples(self, model: nn.Module, step: int) -> list[Examples]:
        """D at a checkpoint: rollouts that its policy drew, or the preferences."""
        if self.rollouts is not None:
            chosen = at_step(self.rollouts, step)
            found = rollout_examples(chosen, self.pad, self.loss.needs, batch_size=self.batch_size)
            return [one.to(_device(model)) for one in found]
        assert self.rows is not None
        shift = self._shift(model)
        return [self._examples(collate(rows, self.pad), shift).to(_device(model)) for rows in self._cut(self.rows)]

    def shapes(self) -> list[Examples]:
        """D with made-up numbers, for a prediction."""
        if self.rollouts is not None:
            return rollout_examples(self.rollouts, self.pad, self.loss.needs, batch_size=self.batch_size)
        assert self.rows is not None
        shift: dict[str, Tensor] = {"kl": torch.zeros(())} if "kl" in self.loss.needs else {}
        batches = [collate(rows, self.pad) for rows in self._cut(self.rows)]
        return [self._examples(one | {"ref_logp": torch.zeros(one["labels"].shape)}, shift) for one in batches]

    def _examples(self, batch: Mapping[str, Tensor], shift: dict[str, Tensor]) -> Examples:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return Examples(inputs, batch["labels"], side_inputs_of(self.loss, batch) | shift)

    def _cut(self, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Batches of about as many answers as were asked for, of rows of about one length."""
        size = max(1, self.batch_size // len(rows[0]["ids"]))
        ordered = sorted(rows, key=lambda row: max(map(len, row["ids"])))
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]

    def _shift(self, model: nn.Module) -> dict[str, Tensor]:
        """KTO's reference point at the policy, over the whole of D."""
        if "kl" not in self.loss.needs:
            return {}
        assert self.rows is not None
        total, count = 0.0, 0
        for rows in self._cut(self.rows):
            batch = collate(rows, self.pad, "other_")
            logp = _log_probs(model, batch, "other_").cpu()
            total += (logp.double() - batch["other_ref_logp"]).sum().item()
            count += len(logp)
        return {"kl": torch.tensor(max(total / count, 0.0))}


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
    found: list[Rollout] = []
    torch.manual_seed(seed)
    for first in range(0, len(prompts), batch_size):
        rows = prompts[first : first + batch_size]
        answers = answers_to(model, rows, tokenizer, longest, sampled=sampled)
        found += [Rollout(list(row), answer) for row, answer in zip(rows, answers, strict=True)]
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
        # blank lines stay, for rows are named by their number
        given = (json.dumps(row | {"label": True}) for row in rows)
        labelled.write_text("\n".join(next(given) if line.strip() else "" for line in lines), encoding="utf-8")
        options: Mapping[str, Any] = {"single": True, "max_length": max_length, "vocabulary": vocabulary}
        try:
            found = load_preferences(str(labelled), tokenizer, **options)
        except PreferenceError as error:
            raise ValueError(str(error).replace(str(labelled), f"--final {path}")) from None
        return [Rollout(prompt, answer) for prompt, answer in answers_of(list(found.rows))]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _log_probs(model: nn.Module, batch: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Of the answers' tokens, (B, S - 1)."""
    inputs = {name: batch[prefix + name].to(_device(model)) for name in ("input_ids", "attention_mask")}
    logp = token_stats_of(model, inputs, batch[f"{prefix}labels"].to(_device(model))).logp
    assert logp is not None
    return logp
