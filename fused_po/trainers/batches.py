"""Rows of preferences as padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_po.ops.checks import IGNORE

__all__ = ["AnswerBatch", "collate", "mismatched", "pad_answers"]


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
    mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORE)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        input_ids[row, :length] = torch.tensor(prompt + answer)
        mask[row, :length] = 1
        targets[row, len(prompt) : length] = input_ids[row, len(prompt) : length]
    return AnswerBatch(input_ids, mask, targets[:, 1:].contiguous())


def collate(rows: Sequence[Mapping[str, Any]], pad: int, prefix: str = "") -> dict[str, Tensor]:
    """Rows of ``Preferences`` as a batch: of pairs all chosen answers, then all rejected ones in the same order.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, S), ``targets`` (B, S - 1), which are shifted labels, ``signs`` (B,),
        and, where the rows have it, ``ref_logp`` (B, S - 1), 0 where ignored. The same with ``other_`` in front for
        prompts with answers to other prompts.
    """
    flat = [(row, side) for side in range(len(rows[0][f"{prefix}ids"])) for row in rows]
    split = [(row[f"{prefix}ids"][side], row[f"{prefix}starts"][side]) for row, side in flat]
    answers = pad_answers([(ids[:start], ids[start:]) for ids, start in split], pad)
    batch = {"input_ids": answers.input_ids, "attention_mask": answers.attention_mask, "targets": answers.labels}
    if f"{prefix}ref" in rows[0]:
        found = torch.zeros(answers.labels.shape)
        found[answers.labels != IGNORE] = torch.tensor([x for row, side in flat for x in row[f"{prefix}ref"][side]])
        batch["ref_logp"] = found
    batch = {f"{prefix}{name}": value for name, value in batch.items()}
    if prefix:
        return batch
    batch["signs"] = torch.tensor([row["signs"][side] for row, side in flat])
    return batch | (collate(rows, pad, "other_") if "other_ids" in rows[0] else {})


def mismatched(row: Mapping[str, Any], rows: Any, place: int) -> dict[str, Any]:
    """The prompts of a row with the answers of the next row, round the end, whose prompt is another."""
    for step in range(1, len(rows)):
        other = rows[(place + step) % len(rows)]
        if other["ids"][0][: other["starts"][0]] != row["ids"][0][: row["starts"][0]]:
            break
    else:
        raise ValueError("kto needs rows with different prompts: its reference point comes from mismatched answers")
    pairs = list(zip(row["ids"], row["starts"], other["ids"], other["starts"], strict=True))
    # never longer than what is trained on
    ids = [(mine[:start] + ids[first:])[: max(len(mine), len(ids))] for mine, start, ids, first in pairs]
    return {"other_ids": ids, "other_starts": list(row["starts"])}
