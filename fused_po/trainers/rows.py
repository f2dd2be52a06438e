"""Rows of preferences as their files hold them: checked, and brought to TRL's columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "KEYS",
    "PreferenceError",
    "common",
    "converted_row",
    "documents_to_rows",
    "layout_of",
    "plain_messages",
    "prompt_and_answers",
    "row_of",
    "shortened",
]

KEYS = ("prompt", "chosen", "rejected", "completion")
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class PreferenceError(ValueError):
    """Preferences that can't be used; the message names the file and the row, from 1, blank lines counted."""


def documents_to_rows(batch: dict[str, list[str]]) -> dict[str, list[str]]:
    """Whole JSON files to one string a row: a list of rows, an object that holds one, or lines after all."""
    found: list[str] = []
    for document in batch["text"]:
        try:
            value = json.loads(document)
        except (ValueError, RecursionError):
            found += document.split("\n")
            continue
        if isinstance(value, dict):
            lists = [one for one in value.values() if isinstance(one, list)]
            is_row = {*KEYS, "conversations", "instruction"} & set(value)
            value = lists[0] if len(lists) == 1 and not is_row else [value]
        found += map(json.dumps, value) if isinstance(value, list) else [document]
    return {"text": found}


def row_of(record: dict[str, Any], where: str) -> dict[str, Any] | None:
    """A row by its columns, None for a blank line."""
    if set(record) != {"text"}:
        return record
    if not record["text"].strip():
        return None
    try:
        row = json.loads(record["text"])
    except RecursionError:
        raise PreferenceError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise PreferenceError(f"{where}: not JSON ({shortened(error)})") from None
    if not isinstance(row, dict):
        raise PreferenceError(f"{where}: an object is wanted, got {type(row).__name__}")
    return row


def layout_of(row: Mapping[str, Any]) -> str:
    if "conversations" in row:
        return "ShareGPT"
    if "instruction" in row and "prompt" not in row:
        return "Alpaca"
    whole = isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list)
    return "UltraFeedback" if whole else ""


def converted_row(row: dict[str, Any], layout: str, template: bool, where: str) -> dict[str, Any]:
    """A row with TRL's columns.

    ShareGPT (``conversations``, messages of ``from`` and ``value``), Alpaca (``instruction``, ``input``; as messages
    where there is a chat template) and UltraFeedback (a prompt as text beside whole conversations).
    """
    try:
        if layout == "ShareGPT":
            turns = [_turn(one) for one in row["conversations"]]
            turns[:0] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            if "chosen" in row:
                return {**row, "prompt": turns, **{side: [_turn(row[side])] for side in ("chosen", "rejected")}}
            return {
                **row,
                "prompt": turns[:-1],
                "completion": turns[-1:],
                "label": row.get("label", row.get("kto_tag")),
            }
        if layout == "Alpaca":
            prompt = "\n".join(row[key] for key in ("instruction", "input") if row.get(key))
            given: dict[str, Any] = {side: row[side] for side in ("chosen", "rejected") if side in row}
            given = given or {"completion": row["output"]}
            said: Any = {side: [{"role": "assistant", "content": text}] for side, text in given.items()}
            system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            asked: Any = [*system, {"role": "user", "content": prompt}]
            found = {**row, "prompt": asked, **said} if template else {**row, "prompt": prompt + "\n", **given}
            return found if "chosen" in found else {**found, "label": row.get("label", row.get("kto_tag"))}
        if layout == "UltraFeedback":
            prompt, first = row["prompt"], row["chosen"][0]
            if first.get("role") == "assistant":
                return {**row, "prompt": [{"role": "user", "content": prompt}]}
            return {key: value for key, value in row.items() if key != "prompt"}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PreferenceError(
            f"{where}: not as the {layout} rows of this file ({type(error).__name__}: {error})"
        ) from None
    return row


def _turn(one: Mapping[str, str]) -> dict[str, str]:
    return {"role": _ROLES.get(one["from"], one["from"]), "content": one["value"]} if "from" in one else dict(one)


def prompt_and_answers(row: dict[str, Any], chat: bool, where: str) -> tuple[list[Any], list[int]]:
    """The answers of a row and their sides; where there is no prompt, what the answers begin with alike becomes it."""
    names: list[str] = ["chosen", "rejected"] if {"chosen", "rejected"} & row.keys() else ["completion"]
    missing = [name for name in names if row.get(name) is None]
    if missing or (names == ["completion"] and row.get("prompt") is None):
        wanted = "prompt, chosen, rejected or prompt, completion, label"
        raise PreferenceError(f"{where}: no {missing[0] if missing else 'prompt'}; wanted are {wanted}")
    for name in ("prompt", *names):
        value = row.get(name)
        if value is None and name == "prompt":
            continue
        right = isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        if not (right if chat else isinstance(value, str)):
            kind = "chat messages" if chat else "a string"
            raise PreferenceError(
                f"{where}: {name} must be {kind}, as the first row has it: got {shortened(repr(value), 60)}"
            )
    answers = [row[name] for name in names]
    if row.get("prompt") is None:
        first, second = answers
        # of two that are alike, and where one begins with the other, the last piece is the answer
        shorter, place = min(len(first), len(second)), common(first, second)
        place = place - (place > 0 and first[place - 1] == " ") if place < shorter else shorter - 1
        if place <= 0:
            raise PreferenceError(f"{where}: no prompt, and chosen and rejected begin with nothing in common")
        row["prompt"], answers = first[:place], [first[place:], second[place:]]
    if row["prompt"] == []:
        raise PreferenceError(f"{where}: prompt is an empty list")
    if names != ["completion"]:
        return answers, [1, -1]
    label = _LABELS.get(str(row.get("label")).strip().lower())
    if label is None:
        raise PreferenceError(f"{where}: label must be true or false: got {shortened(repr(row.get('label')), 60)}")
    return answers, [1 if label else -1]


def plain_messages(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Messages whose contents are strings, without the empty fields that a table adds."""
    found = []
    for message in messages:
        one = {key: value for key, value in message.items() if value is not None or key == "content"}
        if isinstance(content := one.get("content"), list):
            parts = [part if isinstance(part, str) else part.get("text") for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise PreferenceError(f"{where}: a message holds something else than text")
            one["content"] = "".join(parts)
        elif content is not None and not isinstance(content, str):
            # a template would print it
            raise PreferenceError(f"{where}: a message holds something else than text")
        found.append(one)
    return found


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def shortened(error: object, width: int = 200) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= width else lines[0][:width] + "..."
