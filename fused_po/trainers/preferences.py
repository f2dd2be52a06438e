"""Preference pairs: read from JSONL, tokenized, padded to batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_po.ops.checks import IGNORE

__all__ = [
    "AnswerBatch",
    "PreferenceError",
    "Preferences",
    "TokenPair",
    "collate",
    "mismatched",
    "pad_answers",
]

_KEYS = ("prompt", "chosen", "rejected")


class PreferenceError(ValueError):
    """A file of preferences that can't be used; the message names file and line."""


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a prompt and its two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


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


@dataclass(frozen=True)
class Preferences:
    """Tokenized pairs.

    Attributes:
        pairs: in the order of the file.
        counts: what was noticed: ``truncated``, ``empty`` answers, ``identical`` answers.
    """

    pairs: list[TokenPair]
    counts: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def texts(path: Path) -> list[dict[str, Any]]:
        """The rows of a JSONL file with ``prompt``, ``chosen``, ``rejected``: strings, or lists of chat messages.

        Raises:
            PreferenceError: no such file, no row, a line that is not JSON, a missing key, or a value of another type.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PreferenceError(f"{path}: can't be read ({error})") from None
        rows = [_row(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise PreferenceError(f"{path}: holds no pair")
        return rows

    @staticmethod
    def read(path: Path, tokenizer: Any, max_length: int, on_too_long: str) -> Preferences:
        """Read and tokenize a file.

        Args:
            path: JSONL.
            tokenizer: from transformers; chat messages need its chat template.
            max_length: bound on prompt and answer together, in tokens.
            on_too_long: ``"truncate"`` cuts the prompt on the left to half of ``max_length``, then the answer on the
                right; ``"refuse"`` raises.

        Raises:
            PreferenceError: see ``texts``; a pair that is too long; chat messages without a template.
        """
        found = Preferences([])
        for number, row in enumerate(Preferences.texts(path), 1):
            found._add(_tokenize(row, tokenizer, f"{path}: pair {number}"), max_length, on_too_long, path, number)
            found.counts["identical"] += row["chosen"] == row["rejected"]
            found.counts["empty"] += sum(not row[side] for side in ("chosen", "rejected"))
        return found

    def _add(self, pair: TokenPair, max_length: int, on_too_long: str, path: Path, number: int) -> None:
        longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if longest > max_length:
            if on_too_long == "refuse":
                raise PreferenceError(f"{path}: pair {number} has {longest} tokens, more than {max_length}")
            self.counts["truncated"] += 1
            prompt = pair.prompt
            room = max_length - max(len(pair.chosen), len(pair.rejected))
            keep = max(room, max_length // 2)
            prompt = prompt[-keep:] if len(prompt) > keep else prompt
            rest = max_length - len(prompt)
            pair = TokenPair(prompt, pair.chosen[:rest], pair.rejected[:rest])
        self.pairs.append(pair)


def collate(pairs: Sequence[TokenPair], pad: int) -> AnswerBatch:
    """Pad pairs to a batch: chosen answers first, then the rejected ones in the same order."""
    return pad_answers([(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs], pad)


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


def mismatched(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """Each prompt with the answers of the next pair: what KTO estimates its reference point from."""
    answers = [*pairs[1:], pairs[0]]
    return [TokenPair(p.prompt, a.chosen, a.rejected) for p, a in zip(pairs, answers, strict=True)]


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PreferenceError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise PreferenceError(f"{where}: an object is wanted, got {type(row).__name__}")
    missing = [key for key in _KEYS if key not in row]
    if missing:
        raise PreferenceError(f"{where}: no {', '.join(missing)}")
    kinds = {_kind(row[key]) for key in _KEYS}
    if len(kinds) != 1 or None in kinds:
        raise PreferenceError(
            f"{where}: prompt, chosen and rejected must be strings, or lists of chat messages, all three"
        )
    return row


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    messages = isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    return "messages" if messages else None


def _tokenize(row: dict[str, Any], tokenizer: Any, where: str) -> TokenPair:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        start = tokenizer(prompt)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # a tokenizer may end what it encodes; the answer comes behind that
        start = start[:-1] if end and start[-1:] == end else start
        pieces = [tokenizer(row[side], add_special_tokens=False)["input_ids"] + end for side in ("chosen", "rejected")]
    else:
        if not tokenizer.chat_template:
            raise PreferenceError(f"{where}: chat messages need a tokenizer with a chat template")
        start = _encode_chat(tokenizer, prompt, add_generation_prompt=True)
        pieces = []
        for side in ("chosen", "rejected"):
            whole = _encode_chat(tokenizer, prompt + row[side], add_generation_prompt=False)
            if whole[: len(start)] != start:
                raise PreferenceError(
                    f"{where}: the chat template does not begin a conversation as it begins its prompt"
                )
            pieces.append(whole[len(start) :])
    if not start:
        # the first token of an answer has nothing to be predicted from
        start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    return TokenPair(start, *pieces)


def _encode_chat(tokenizer: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
