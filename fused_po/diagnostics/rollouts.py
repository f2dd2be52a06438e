"""Rollouts in a file: what a policy loss was taken on while a model trained, for G afterwards.

JSON lines, one for each answer, which any trainer can write:

    {"prompt_ids": [1, 5], "answer_ids": [7, 2], "old_logps": [-0.5, -1.25], "advantage": 0.7, "step": 40}

``prompt_ids`` and ``answer_ids`` are token ids, the prompt's without padding. ``old_logps`` are log-probs of the
answer's tokens under the policy that drew it, in nats, one for each token, or their sum; without them the policy at
hand is that policy. ``ref_logps``, of the reference, likewise, where the loss reads them. ``advantage`` is a number for
the answer, or a list, one for each token. ``mask``, a list of 0 and 1, leaves tokens out (results of tools). ``step``
is the optimizer step before which the answer was drawn. Lines of D' need nothing but ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_po.diagnostics.examples import Examples
from fused_po.ops.checks import IGNORE
from fused_po.trainers.batches import pad_answers

__all__ = [
    "Rollout",
    "RolloutDump",
    "at_step",
    "from_trainer",
    "is_rollouts",
    "read_rollouts",
    "rollout_examples",
    "write_rollouts",
]

_SUMMED = {"old_logp": "old_logps", "ref_logp": "ref_logps"}


@dataclass(frozen=True)
class Rollout:
    """One answer, as a line of the file has it.

    Attributes:
        prompt_ids, answer_ids: tokens.
        old_logps, ref_logps: of each answer token, or their sum; None where they are not known.
        advantage: of the answer, or of each of its tokens; None in D'.
        mask: of each answer token, whether it counts; None: all do.
        step: optimizer steps done when it was drawn; None: nobody says.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    old_logps: list[float] | float | None = None
    ref_logps: list[float] | float | None = None
    advantage: list[float] | float | None = None
    mask: list[int] | None = None
    step: int | None = None


def is_rollouts(path: str | Path) -> bool:
    """Whether a file holds rollouts: its first line is an object with ``answer_ids``."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            first = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "answer_ids" in first


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout], *, append: bool = False) -> None:
    """Write rollouts, a line each; what is None is left out."""
    with Path(path).open("a" if append else "w", encoding="utf-8") as file:
        for one in rollouts:
            file.write(json.dumps({name: value for name, value in vars(one).items() if value is not None}) + "\n")


def read_rollouts(path: str | Path, *, vocabulary: int | None = None) -> list[Rollout]:
    """Read rollouts.

    Args:
        vocabulary: ids from this one on are refused; None: none are.

    Raises:
        ValueError: a line that is no rollout, by its number, or none at all.
    """
    found = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read ({error})") from None
    # other separators of lines may stand in strings
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(_rollout(json.loads(line), vocabulary))
            except RecursionError:
                raise ValueError(f"{path}: line {number}: nested too deeply") from None
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: holds no rollout")
    if not any(one.answer_ids for one in found):
        raise ValueError(f"{path}: every answer is empty")
    return found


def _rollout(row: Any, vocabulary: int | None) -> Rollout:
    if not isinstance(row, dict):
        raise ValueError(f"an object is wanted, got {type(row).__name__}")
    known = set(Rollout.__dataclass_fields__)
    if unknown := sorted(set(row) - known):
        raise ValueError(f"unknown field {unknown[0]!r}: there is {', '.join(sorted(known))}")
    for name in ("prompt_ids", "answer_ids"):
        ids = row.get(name)
        if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
            raise ValueError(f"{name} must be a list of token ids")
        if vocabulary is not None and any(one >= vocabulary for one in ids):
            raise ValueError(f"{name} holds token {max(ids)}, the model has embeddings for {vocabulary}")
    if not row["prompt_ids"]:
        raise ValueError("prompt_ids is empty: nothing predicts the first token of the answer")
    count = len(row["answer_ids"])
    for name in ("old_logps", "ref_logps", "advantage", "mask"):
        value = row.get(name)
        if isinstance(value, list) and len(value) != count:
            raise ValueError(f"{name} has {len(value)} numbers, answer_ids {count} tokens")
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in numbers):
            raise ValueError(f"{name} must be finite numbers")
    if isinstance(row.get("mask"), (int, float)):
        raise ValueError("mask must be a list of 0 and 1")
    if row.get("step") is not None and (type(row["step"]) is not int or row["step"] < 0):
        raise ValueError(f"step must be a whole number of at least 0: got {row['step']!r}")
    return Rollout(**row)


def at_step(rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
    """The rollouts that belong to a checkpoint: the last ones drawn by then, or the first ones of all; all of them
    where they say no step.
    """
    steps = {one.step for one in rollouts if one.step is not None}
    if not steps:
        return list(rollouts)
    chosen = max((one for one in steps if one <= step), default=min(steps))
    return [one for one in rollouts if one.step in (chosen, None)]


def rollout_examples(
    rollouts: Sequence[Rollout], pad: int, reads: Iterable[str] = (), *, batch_size: int = 8
) -> list[Examples]:
    """Rollouts in batches for ``gradient_alignment``.

    Args:
        pad: the token that fills up.
        reads: side inputs that a loss reads (``loss.needs``); for D' none. Where it reads ``old_logp`` and no line has
            it, it is left out: the ratio is then 1.
        batch_size: answers in a batch.

    Raises:
        ValueError: side inputs that a rollout lacks, or that only some of them have.
    """
    wanted = {name for name in reads if name in (*_SUMMED, "advantage")}
    if "old_logp" in wanted and all(one.old_logps is None for one in rollouts):
        wanted.discard("old_logp")
    batches = []
    for first in range(0, len(rollouts), batch_size):
        rows = rollouts[first : first + batch_size]
        padded = pad_answers([(one.prompt_ids, one.answer_ids) for one in rows], pad)
        labels = padded.labels.clone()
        for row, one in enumerate(rows):
            for place, kept in enumerate(one.mask or ()):
                if not kept:
                    labels[row, len(one.prompt_ids) - 1 + place] = IGNORE
        inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
        side = {name: _side(rows, _SUMMED.get(name, name), padded.labels) for name in sorted(wanted)}
        batches.append(Examples(inputs, labels, side))
    return batches


def _side(rows: Sequence[Rollout], name: str, labels: Tensor) -> Tensor:
    """One number per answer (B,) where all have one, else per token (B, S - 1)."""
    values: list[Any] = [getattr(one, name) for one in rows]
    if any(value is None for value in values):
        raise ValueError(f"the loss reads {name}, which {sum(v is None for v in values)} of {len(rows)} rollouts lack")
    if all(not isinstance(value, list) for value in values):
        return torch.tensor([float(value) for value in values])
    if name != "advantage" and any(not isinstance(value, list) for value in values):
        raise ValueError(f"{name} is a sum in some rollouts and one per token in others")
    found = torch.zeros(labels.shape)
    for row, (one, value) in enumerate(zip(rows, values, strict=True)):
        first, count = len(one.prompt_ids) - 1, len(one.answer_ids)
        found[row, first : first + count] = torch.tensor(value if isinstance(value, list) else [float(value)] * count)
    return found


def from_trainer(batch: Mapping[str, Any], step: int) -> list[Rollout]:
    """What TRL's GRPO and RLOO trainers make of a batch of prompts, as rollouts."""
    found = []
    tokens = {"old_logps": "old_per_token_logps", "ref_logps": "ref_per_token_logps"}
    for row in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        kept = batch["completion_mask"][row].bool()
        # padding stands behind the last kept token, what a mask leaves out before it
        length = int(kept.nonzero().max()) + 1 if kept.any() else 0
        given: dict[str, Any] = {
            name: batch[key][row][:length].tolist() for name, key in tokens.items() if batch.get(key) is not None
        }
        if "old_logps" not in given and batch.get("old_logps") is not None:
            given["old_logps"] = batch["old_logps"][row].item()
        tool = batch.get("tool_mask")
        mask = kept[:length] if tool is None else kept[:length] & tool[row][:length].bool()
        if not mask.all():
            given["mask"] = mask.long().tolist()
        advantage = batch["advantages"][row]
        given["advantage"] = advantage.item() if advantage.ndim == 0 else advantage[:length].tolist()
        found.append(Rollout(prompt, batch["completion_ids"][row][:length].tolist(), step=step, **given))
    return found


class RolloutDump:
    """Writes the rollouts of TRL's GRPO and RLOO trainers while they train, for ``fused-po g --data`` afterwards: ids,
    old log-probs and advantages, as ``fused_po.diagnostics.rollouts`` describes the file.

    ``RolloutDump("rollouts.jsonl", every=50).attach(trainer)``, with ``every`` as often as checkpoints are saved: G of
    a checkpoint is taken on the rollouts that its policy drew. Rank 0 writes its own rollouts, other ranks nothing.

    Args:
        path: a file that is made; one that is there is added to.
        every: optimizer steps between dumps, 1; rollouts that were drawn in between are not written.

    Raises:
        ValueError: ``every`` below 1; of ``attach``, a trainer that draws no rollouts.
    """

    def __init__(self, path: str | Path, *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1: got {every}")
        self._path, self._every = Path(path), every
        self._due = 0

    def attach(self, trainer: Any) -> RolloutDump:
        """Listen to a trainer; returns itself."""
        drawn = getattr(trainer, "_generate_and_score_completions", None)
        if drawn is None:
            raise ValueError(f"{type(trainer).__name__} draws no rollouts: a GRPO or RLOO trainer of TRL is wanted")

        def listened(*args: Any, **kwargs: Any) -> Any:
            batch = drawn(*args, **kwargs)
            step = trainer.state.global_step
            if trainer.model.training and step >= self._due and trainer.accelerator.is_main_process:
                write_rollouts(self._path, from_trainer(batch, step), append=True)
                self._due = (step // self._every + 1) * self._every
            return batch

        trainer._generate_and_score_completions = listened
        return self
