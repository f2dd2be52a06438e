"""Rows of preferences as their files hold them: checked, and brought to a prompt with its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Form", "PreferenceError", "Row", "common", "documents_to_rows", "shortened"]

_KEYS = ("prompt", "chosen", "rejected", "completion")
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class PreferenceError(ValueError):
    """Preferences that can't be used; the message names the file and the row, from 1, blank lines counted."""


@dataclass(frozen=True)
class Row:
    """A prompt with its answers, each a string or a list of chat messages with strings as contents.

    Attributes:
        where: the file and the row, for messages.
        prompt: empty where there is none.
        answers: the chosen and the rejected one, or a single one.
        signs: of each answer, 1 where it is chosen or desirable, else -1.
        given: all columns of the file.
    """

    where: str
    prompt: Any
    answers: list[Any]
    signs: list[int]
    given: dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How the rows of a source are read: as its first one decides.

    Attributes:
        source: for messages.
        template: the tokenizer has a chat template, to which Alpaca's rows go as messages.
        layout: what columns are converted to TRL's: ShareGPT (``conversations``, messages of ``from`` and ``value``),
            Alpaca (``instruction``, ``input``), UltraFeedback (a prompt as text beside whole conversations) or "".
        chat: rows hold chat messages, else text.
        paired: rows hold pairs, else single answers.
    """

    source: str
    template: bool
    layout: str = ""
    chat: bool = False
    paired: bool = True

    @classmethod
    def of(cls, records: Iterable[tuple[int, dict[str, Any]]], source: str, template: bool) -> Form:
        """The form of numbered records.

        Raises:
            PreferenceError: there are none, or the first can't be read.
        """
        for number, record in records:
            row = _parsed(record, f"{source}: row {number}")
            if row is not None:
                whole = isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list)
                layout = "ShareGPT" if "conversations" in row else "UltraFeedback" if whole else ""
                layout = "Alpaca" if "instruction" in row and not {"prompt", "conversations"} & row.keys() else layout
                row = cls(source, template, layout)._converted(row, f"{source}: the first row")
                chat = any(isinstance(row.get(key), list) for key in _KEYS)
                paired = "completion" not in row or bool({"chosen", "rejected"} & row.keys())
                return cls(source, template, layout, chat, paired)
        raise PreferenceError(f"{source}: holds no pair")

    def row(self, record: dict[str, Any], number: int) -> Row | None:
        """A record by its columns, None for a blank line.

        Raises:
            PreferenceError: it is not what the first row promised, or not whole.
        """
        where = f"{self.source}: row {number}"
        found = _parsed(record, where)
        return None if found is None else self._checked(self._converted(found, where), where)

    def _converted(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """A row with TRL's columns."""
        try:
            made: dict[str, Any] = {"label": row.get("label", row.get("kto_tag"))}
            system = [_message("system", row["system"])] if self.layout and row.get("system") else []
            if self.layout == "ShareGPT":
                turns = system + [_turn(one) for one in row["conversations"]]
                pair = {side: [_turn(row[side])] for side in ("chosen", "rejected")} if "chosen" in row else {}
                made |= {"prompt": turns, **pair} if pair else {"prompt": turns[:-1], "completion": turns[-1:]}
            elif self.layout == "Alpaca":
                asked = "\n".join(row[key] for key in ("instruction", "input") if row.get(key))
                said: dict[str, Any] = {side: row[side] for side in ("chosen", "rejected") if side in row}
                said = said or {"completion": row["output"]}
                if self.template:
                    said = {side: [_message("assistant", text)] for side, text in said.items()}
                made |= {"prompt": [*system, _message("user", asked)] if self.template else asked + "\n", **said}
            elif self.layout == "UltraFeedback":
                alone = row["chosen"][0].get("role") == "assistant"
                made |= {"prompt": [_message("user", row["prompt"])] if alone else None}
            return row | made
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise PreferenceError(
                f"{where}: not as the {self.layout} rows of this file ({type(error).__name__}: {error})"
            ) from None

    def _checked(self, row: dict[str, Any], where: str) -> Row:
        """A row with TRL's columns; where there is no prompt, what both answers begin with becomes it."""
        paired = bool({"chosen", "rejected"} & row.keys()) or (self.paired and "completion" not in row)
        names = ["chosen", "rejected"] if paired else ["completion"]
        missing = [name for name in names if row.get(name) is None]
        if missing or not (paired or row.get("prompt") is not None):
            wanted = "prompt, chosen, rejected or prompt, completion, label"
            got = shortened(", ".join(name for name, value in row.items() if value is not None) or "none of them")
            raise PreferenceError(f"{where}: no {missing[0] if missing else 'prompt'}; wanted are {wanted}, got {got}")
        values = {name: row[name] for name in ("prompt", *names) if row.get(name) is not None}
        for name, value in values.items():
            if not (_is_chat(value) if self.chat else isinstance(value, str)):
                kind, got = "chat messages" if self.chat else "a string", shortened(repr(value), 60)
                raise PreferenceError(f"{where}: {name} must be {kind}, as the first row has it: got {got}")
        if paired != self.paired:
            here, first = ("a pair", "a single answer")[:: 1 if paired else -1]
            raise PreferenceError(f"{where}: {here}, where the first row has {first}")
        if self.chat:
            values = {name: [_plain(message, where) for message in value] for name, value in values.items()}
        prompt, answers = values.get("prompt"), [values[name] for name in names]
        if prompt == []:
            raise PreferenceError(f"{where}: prompt is an empty list")
        if prompt is None:
            first, second = answers
            # of two that are alike, and where one begins with the other, the last piece is the answer
            shorter, place = min(len(first), len(second)), common(first, second)
            place = place - (place > 0 and first[place - 1] == " ") if place < shorter else shorter - 1
            if place <= 0:
                raise PreferenceError(f"{where}: no prompt, and chosen and rejected begin with nothing in common")
            prompt, answers = first[:place], [first[place:], second[place:]]
        label = True if paired else _LABELS.get(str(row["label"]).strip().lower())
        if label is None:
            raise PreferenceError(f"{where}: label must be true or false: got {shortened(repr(row['label']), 60)}")
        return Row(where, prompt, answers, [1, -1] if paired else [1 if label else -1], row)


def _parsed(record: dict[str, Any], where: str) -> dict[str, Any] | None:
    """A record by its columns: those of JSON come as one string, ``text``; None for a blank line."""
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
            is_row = {*_KEYS, "conversations", "instruction"} & set(value)
            value = lists[0] if len(lists) == 1 and not is_row else [value]
        found += map(json.dumps, value) if isinstance(value, list) else [document]
    return {"text": found}


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _turn(one: Mapping[str, str]) -> dict[str, Any]:
    return _message(_ROLES.get(one["from"], one["from"]), one["value"]) if "from" in one else dict(one)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)


def _plain(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message whose content is a string, without the empty fields that a table adds."""
    one = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = one.get("content")
    if isinstance(content, list):
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = one["content"] = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if not isinstance(content, str | None):
        # a template would print it
        raise PreferenceError(f"{where}: a message holds something else than text")
    if content is None and not one.keys() - {"role", "content", "name"}:
        raise PreferenceError(f"{where}: a message without content")
    return one


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def shortened(error: object, width: int = 200) -> str:
    """What is said, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else text[:width] + "..."
