"""Preference pairs of a study: a part that is trained on, and a part that is held out, by prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_po.trainers.data import PreferenceError, checked_rows
from fused_po.trainers.whole import write_text

__all__ = ["Pairs", "last_words", "read_pairs", "words_of"]

# of the order in which prompts are held out: the same for all seeds, so that their win rates are over the same prompts
SPLIT_SEED = 0


@dataclass(frozen=True)
class Pairs:
    """Rows with ``prompt``, ``chosen`` and ``rejected``, strings or chat messages, and all other columns of the data.

    Attributes:
        train: what is trained on.
        held_out: what is measured on; no prompt is in both.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """``train.jsonl`` and ``held_out.jsonl``, which other commands read too."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", self.train), ("held_out", self.held_out)):
            lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            write_text(folder / f"{name}.jsonl", lines)


def read_pairs(source: str, held_out: int, eval_source: str | None = None, template: bool = True) -> Pairs:
    """Read preference pairs.

    Args:
        source: a file, a folder or a hub id, as ``fused-po train`` takes them.
        held_out: prompts to hold out; with ``eval_source`` the most that are taken of it.
        eval_source: held-out pairs of their own; what has their prompts is not trained on.
        template: whether the tokenizer has a chat template.

    Raises:
        PreferenceError: rows that can't be read, single answers, too few prompts to hold so many out, or none left to
            train on.
    """
    rows = _read(source, template)
    order = random.Random(SPLIT_SEED)
    if eval_source is not None:
        others = _read(eval_source, template)
        order.shuffle(others)
        kept_rows = _one_each(others)[:held_out]
        kept = {json.dumps(row["prompt"]) for row in kept_rows}
        train = [row for row in rows if json.dumps(row["prompt"]) not in kept]
        if not train:
            raise PreferenceError(f"{source}: all its prompts are those of {eval_source}, which are held out")
        return Pairs(train, kept_rows)
    prompts = [json.dumps(row["prompt"]) for row in rows]
    distinct = sorted(set(prompts))
    if held_out >= len(distinct):
        raise PreferenceError(f"{source}: {len(distinct)} prompts, of which {held_out} can't be held out")
    order.shuffle(distinct)
    kept = set(distinct[:held_out])
    train = [row for row, prompt in zip(rows, prompts, strict=True) if prompt not in kept]
    return Pairs(train, _one_each([row for row, prompt in zip(rows, prompts, strict=True) if prompt in kept]))


def words_of(value: Any) -> str:
    """A prompt or an answer as one text, messages one after the other."""
    return value if isinstance(value, str) else "\n\n".join(message["content"] or "" for message in value)


def last_words(value: Any) -> str:
    """A prompt as an instruction: its text, or what the last message says."""
    return value if isinstance(value, str) else value[-1]["content"] or ""


def _read(source: str, template: bool) -> list[dict[str, Any]]:
    rows = []
    for row in checked_rows(source, template):
        if len(row.answers) == 1:
            raise PreferenceError(f"{source}: holds single answers (completion, label), a study takes pairs")
        chosen, rejected = row.answers
        rows.append({**row.given, "prompt": row.prompt, "chosen": chosen, "rejected": rejected})
    if not rows:
        raise PreferenceError(f"{source}: holds no pair")
    return rows


def _one_each(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each prompt."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["prompt"]), row)
    return list(found.values())
