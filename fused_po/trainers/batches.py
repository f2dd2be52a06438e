"""Rows of preferences as padded batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_po.ops.checks import IGNORE

__all__ = ["AnswerBatch", "answers_of", "collate", "mismatched", "pad_answers"]


@dataclass(frozen=True)
class AnswerBatch:
    """Prompts with answers, padded on the right; of pairs the first half is chosen, the second rejected.

    Attributes:
        input_ids: (B, S) int64.
        attention_mask: (B, S) int64.
        labels: (B, S - 1) int64, shifted: position t holds the token that t predicts; -100 on prompts and padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> AnswerBatch:
        return AnswerBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def pad_answers(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> AnswerBatch:
    """Pad prompts with an answer each, token ids, on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), width), pad)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE)
    for row, (prompt, answer) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, start:end] = input_ids[row, start:end]
    return AnswerBatch(input_ids, mask, labels[:, 1:].contiguous())


def answers_of(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> list[tuple[list[int], list[int]]]:
    """The prompt and the answer of each answer in rows of ``Preferences``, token ids; of pairs all chosen answers, then
    all rejected ones in the same order.
    """
    ids, starts = f"{prefix}ids", f"{prefix}starts"
    flat = ((row[ids][side], row[starts][side]) for side in range(len(rows[0]["ids"])) for row in rows)
    return [(tokens[:start], tokens[start:]) for tokens, start in flat]


def collate(rows: Sequence[Mapping[str, Any]], pad: int, prefix: str = "") -> dict[str, Tensor]:
    """Rows of ``Preferences`` as a batch: of pairs all chosen answers, then all rejected ones in the same order.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, S), ``labels`` (B, S - 1), shifted, ``signs`` (B,),
        and, where the rows have it, ``ref_logp`` (B, S - 1), 0 where ignored. The same with ``other_`` in front for
        prompts with answers to other prompts.
    """
    answers, sides = pad_answers(answers_of(rows, prefix), pad), range(len(rows[0]["ids"]))
    batch = vars(answers)
    if f"{prefix}ref" in rows[0]:
        known = torch.zeros(answers.labels.shape)
        said = itertools.chain(*(row[f"{prefix}ref"][side] for side in sides for row in rows))
        known[answers.labels != IGNORE] = torch.tensor(list(said))
        batch = batch | {"ref_logp": known}
    if prefix:
        return {prefix + name: value for name, value in batch.items()}
    batch = batch | {"signs": torch.tensor([row["signs"][side] for side in sides for row in rows])}
    return batch | (collate(rows, pad, "other_") if "other_ids" in rows[0] else {})


def mismatched(rows: Any, place: int) -> dict[str, Any]:
    """The prompts of a row with the answers of the next row, round the end, whose prompt is another."""
    row = rows[place]
    for step in range(1, len(rows)):
        other = rows[(place + step) % len(rows)]
        if other["ids"][0][: other["starts"][0]] != row["ids"][0][: row["starts"][0]]:
            break
    else:
        raise ValueError("kto needs rows with different prompts: its reference point comes from mismatched answers")
    pairs = zip(row["ids"], row["starts"], other["ids"], other["starts"], strict=True)
    # never longer than what is trained on
    ids = [(mine[:start] + ids[first:])[: max(len(mine), len(ids))] for mine, start, ids, first in pairs]
    return {"other_ids": ids, "other_starts": row["starts"]}
