"""Preferences through ``datasets``: from files, folders and hub ids to token ids, by the rule of TRL 1.16.

The rule: the first row decides whether a file holds chat messages or text. An answer in text gets the end token
unless it ends with it. The prompt alone, and the prompt with each answer, are tokenized; messages go through the chat
template, the prompt alone with ``add_generation_prompt``. An answer begins where the two part; both answers of a pair
where the first of them does. A row whose prompt alone reaches ``max_length`` is dropped, others are cut on the right.

Where TRL errs, this differs: an end token that the tokenizer adds itself is not doubled; contents that are lists of
text parts are read, not printed; a tokenizer without an end token is served; answers without prompt or common
beginning, which TRL takes apart at the wrong end, are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

__all__ = ["PreferenceError", "Preferences", "load_preferences", "texts"]

_LISTS = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
_NUMBERS = datasets.Sequence(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {"ids": _LISTS, "starts": _NUMBERS, "signs": _NUMBERS, "tokens": _NUMBERS, "notes": datasets.Value("string")}
)
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_KEYS = ("prompt", "chosen", "rejected", "completion")


class PreferenceError(ValueError):
    """Preferences that can't be used; the message names the file and the row, from 1, blank lines counted."""


@dataclass(frozen=True)
class Preferences:
    """Tokenized preferences.

    Attributes:
        rows: a ``datasets.Dataset`` with ``ids`` (prompt and answer, a list for each answer), ``starts`` (where each
            answer begins), ``signs`` (1 of chosen or desirable answers, else -1) and ``tokens`` (that carry loss): two
            of each in the row of a pair.
        counts: rows that were dropped, cut or odd, by reason.
        layout: what columns were recognised and converted; empty for TRL's own.
    """

    rows: Any
    counts: Counter[str]
    layout: str


def load_preferences(
    source: str,
    tokenizer: Any,
    *,
    single: bool = False,
    max_length: int = 1024,
    on_too_long: str = "truncate",
    vocabulary: int | None = None,
    num_proc: int | None = None,
    rows: int | None = None,
) -> Preferences:
    """Read and tokenize preferences. ``datasets`` caches both steps.

    Args:
        source: a file (JSONL, JSON, CSV, parquet; plain or packed by gz, zst, ...), a folder (of ``save_to_disk``, or
            of files), or a hub id; ``ID:SPLIT`` takes another split than ``train``.
        tokenizer: from transformers; chat messages need its chat template.
        single: answers are learned one by one: those of a pair begin each in its own place, and files of single answers
            (``completion``, ``label``) are taken too.
        max_length: bound on prompt and answer together, in tokens.
        on_too_long: ``"truncate"``, or ``"refuse"``: raise where a row would be cut or dropped.
        vocabulary: token ids from this one on are refused; None: none are.
        num_proc: processes that tokenize.
        rows: stream: fetch this many rows and no more, into memory.

    Raises:
        PreferenceError: what can't be read or used.
    """
    raw = _read(source, rows)
    first = next((row for n, one in enumerate(raw, 1) if (row := _row(one, f"{source}: row {n}")) is not None), None)
    if first is None:
        raise PreferenceError(f"{source}: holds no pair")
    layout = _layout(first)
    converted = _converted(first, layout, bool(tokenizer.chat_template), f"{source}: the first row")
    if "completion" in converted and not single:
        raise PreferenceError(f"{source}: holds single answers (completion, label), the loss takes pairs")
    chat = any(isinstance(converted.get(key), list) for key in _KEYS)
    encoder = _Encoder(tokenizer, source, layout, chat, single, max_length, on_too_long == "refuse", vocabulary)
    encoded = raw.map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=raw.column_names,
        features=_FEATURES,
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        new_fingerprint=Hasher.hash([raw._fingerprint, encoder.key]),
        desc=f"tokenizing {Path(source).name}",
    )
    notes = encoded["notes"]
    counts = Counter(note for one in notes if one for note in one.split("; "))
    if any(name.startswith("dropped") for name in counts):
        encoded = encoded.select([index for index, one in enumerate(notes) if not one.startswith("dropped")])
    if not len(encoded):
        raise PreferenceError(f"{source}: holds no pair that can be learned ({_counted(counts) or 'all lines blank'})")
    return Preferences(encoded.remove_columns("notes"), counts, layout)


def texts(source: str, rows: int | None = None) -> Iterator[str]:
    """All texts of a source, for a tokenizer that is trained on them."""
    layout = None
    for number, record in enumerate(_read(source, rows), 1):
        where = f"{source}: row {number}"
        if row := _row(record, where):
            layout = _layout(row) if layout is None else layout
            row = _converted(row, layout, True, where)
            answers, _ = _answers(row, isinstance(row.get("chosen", row.get("completion")), list), where)
            for value in (row["prompt"], *answers):
                yield from (value,) if isinstance(value, str) else (m["content"] or "" for m in _plain(value, where))


@dataclass(frozen=True)
class _Encoder:
    """Maps batches of rows to token ids."""

    tokenizer: Any
    source: str
    layout: str
    chat: bool
    single: bool
    max_length: int
    refuse: bool
    vocabulary: int | None

    @property
    def key(self) -> list[Any]:
        """What decides the outcome beside the rows."""
        tokenizer = self.tokenizer
        fast = getattr(tokenizer, "backend_tokenizer", None)
        state = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
        own = [
            state,
            tokenizer.chat_template,
            tokenizer.eos_token,
            getattr(tokenizer, "init_kwargs", {}).get("add_eos_token"),
        ]
        return [1, own, self.source, self.layout, self.chat, self.single, self.max_length, self.refuse, self.vocabulary]

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        columns = list(batch)
        places, written = [], []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            where = f"{self.source}: row {index + 1}"
            row = _row(dict(zip(columns, values, strict=True)), where)
            if row is not None:
                places.append(where)
                written.append(self._texts(row, where))
        flat = self._tokenize([text for strings, _, _ in written for text in strings])
        made: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for where, (strings, signs, odd) in zip(places, written, strict=True):
            prompt, *answers = [next(flat) for _ in strings]
            for name, value in zip(made, self._row_of(prompt, answers, signs, odd, where), strict=True):
                made[name].append(value)
        return made

    def _texts(self, row: dict[str, Any], where: str) -> tuple[list[str], list[int], list[str]]:
        """The prompt and the prompt with each answer as strings, the sides of the answers, and what is odd."""
        row = _converted(row, self.layout, bool(self.tokenizer.chat_template), where)
        answers, signs = _answers(row, self.chat, where)
        prompt, odd = row["prompt"], []
        odd += ["identical answers"] if len(answers) == 2 and answers[0] == answers[1] else []
        odd += ["empty answers"] * sum(answer in ("", []) for answer in answers)
        try:
            if self.chat:
                tools = json.loads(tools) if isinstance(tools := row.get("tools"), str) and tools else tools or None
                options = {"tools": tools, "tokenize": False, **(row.get("chat_template_kwargs") or {})}
                render, head, *tail = (
                    self.tokenizer.apply_chat_template,
                    *(_plain(one, where) for one in (prompt, *answers)),
                )
                found = [render(head, add_generation_prompt=True, **options)]
                found += [render(head + one, **options) for one in tail]
            else:
                end = "" if self._ends else self.tokenizer.eos_token or ""
                found = [prompt, *(prompt + (one if one.endswith(end) else one + end) for one in answers)]
            "".join(found).encode()
        except PreferenceError:
            raise
        except UnicodeEncodeError:
            raise PreferenceError(f"{where}: holds half of a surrogate pair, which is no text") from None
        except Exception as error:
            # a template may raise anything
            raise PreferenceError(f"{where}: the chat template refuses it ({_shortened(error)})") from None
        return found, signs, odd

    @cached_property
    def _ends(self) -> bool:
        """The tokenizer ends what it encodes itself."""
        end = self.tokenizer.eos_token_id
        return end is not None and self.tokenizer("a")["input_ids"][-1:] == [end]

    def _tokenize(self, strings: list[str]) -> Iterator[list[int]]:
        found = self.tokenizer(strings, add_special_tokens=not self.chat)["input_ids"] if strings else []
        return iter(found)

    def _row_of(
        self, prompt: list[int], answers: list[list[int]], signs: list[int], odd: list[str], where: str
    ) -> tuple[list[list[int]], list[int], list[int], list[int], str]:
        end = self.tokenizer.eos_token_id
        if self._ends and not self.chat:
            # the prompt's own end would pass for the first token of an empty answer
            prompt = prompt[:-1]
            answers = [ids[:-1] if ids[-2:] == [end, end] else ids for ids in answers]
        starts = [_common(prompt, ids) for ids in answers]
        starts = starts if self.single else [min(starts)] * len(starts)
        longest = max(map(len, answers))
        if self.refuse and longest > self.max_length:
            raise PreferenceError(f"{where}: {longest} tokens, more than {self.max_length}")
        largest = max((token for ids in answers for token in ids), default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise PreferenceError(f"{where}: token {largest}, the model has embeddings for {self.vocabulary}")
        if max(starts) >= self.max_length:
            return [], [], [], [], "dropped: the prompt alone reaches the length"
        kept = [ids[: self.max_length] for ids in answers]
        # the first token of all is predicted by nothing
        tokens = [max(0, len(ids) - max(start, 1)) for ids, start in zip(kept, starts, strict=True)]
        if not any(tokens):
            return [], [], [], [], "dropped: no token to learn"
        return kept, starts, signs, tokens, "; ".join([*odd, *(["cut to the length"] if kept != answers else [])])


def _read(source: str, rows: int | None) -> Any:
    """The rows of a source as they are; those of JSON as one column of strings, ``text``."""
    path, split = Path(source).expanduser(), "train"
    kind = next((s for s in reversed(path.suffixes) if s.lower() not in (".gz", ".zst", ".bz2", ".xz")), "").lower()
    options: dict[str, Any] = {"streaming": rows is not None, "data_files": str(path)}
    try:
        if path.is_file() and kind in (".csv", ".tsv"):
            options |= {"sep": "," if kind == ".csv" else "\t", "keep_default_na": False, "encoding": "utf-8-sig"}
            names = datasets.load_dataset("csv", split=split, **{**options, "streaming": True}).take(1).to_list()[0]
            # an answer of digits is a text
            options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
            found = datasets.load_dataset("csv", split=split, **options)
        elif path.is_file() and kind in (".parquet", ".arrow"):
            found = datasets.load_dataset(kind[1:], split=split, **options)
        elif path.is_file():
            # a byte that is not UTF-8 becomes an escape that JSON does not know, and its row is refused
            options |= {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace"}
            options["sample_by"] = "document" if kind == ".json" else "line"
            found = datasets.load_dataset("text", split=split, **options)
            found = found.map(_documents, batched=True, batch_size=1) if kind == ".json" else found
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        elif not path.exists() and (kind or source.startswith((".", "/", "~"))):
            raise FileNotFoundError("no such file or folder")
        else:
            name, _, other = source.partition(":")
            found = datasets.load_dataset(name, split=other or split, streaming=rows is not None)
        return found if rows is None else datasets.Dataset.from_list(list(found.take(rows)))
    except Exception as error:
        # what datasets and its readers raise has no common base
        raise PreferenceError(f"{source}: can't be read ({_shortened(error.__cause__ or error)})") from None


def _documents(batch: dict[str, list[str]]) -> dict[str, list[str]]:
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


def _row(record: dict[str, Any], where: str) -> dict[str, Any] | None:
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
        raise PreferenceError(f"{where}: not JSON ({_shortened(error)})") from None
    if not isinstance(row, dict):
        raise PreferenceError(f"{where}: an object is wanted, got {type(row).__name__}")
    return row


def _layout(row: Mapping[str, Any]) -> str:
    if "conversations" in row:
        return "ShareGPT"
    if "instruction" in row and "prompt" not in row:
        return "Alpaca"
    whole = isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list)
    return "UltraFeedback" if whole else ""


def _converted(row: dict[str, Any], layout: str, template: bool, where: str) -> dict[str, Any]:
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
            given = {side: row[side] for side in ("chosen", "rejected") if side in row}
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
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise PreferenceError(
            f"{where}: not as the {layout} rows of this file ({type(error).__name__}: {error})"
        ) from None
    return row


def _turn(one: Mapping[str, str]) -> dict[str, str]:
    return {"role": _ROLES.get(one["from"], one["from"]), "content": one["value"]} if "from" in one else dict(one)


def _answers(row: dict[str, Any], chat: bool, where: str) -> tuple[list[Any], list[int]]:
    """The answers of a row and their sides; where there is no prompt, what the answers begin with alike becomes it."""
    names = [name for name in ("chosen", "rejected") if name in row] or ["completion"]
    missing = [name for name in (*names, "rejected" if "chosen" in row else names[0]) if row.get(name) is None]
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
                f"{where}: {name} must be {kind}, as the first row has it: got {_shortened(repr(value), 60)}"
            )
    answers = [row[name] for name in names]
    if row.get("prompt") is None:
        first, second = answers
        # of two that are alike, and where one begins with the other, the last piece is the answer
        shorter, place = min(len(first), len(second)), _common(first, second)
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
        raise PreferenceError(f"{where}: label must be true or false: got {_shortened(repr(row.get('label')), 60)}")
    return answers, [1 if label else -1]


def _plain(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Messages whose contents are strings, without the empty fields that a table adds."""
    found = []
    for message in messages:
        one = {key: value for key, value in message.items() if value is not None or key == "content"}
        if isinstance(content := one.get("content"), list):
            parts = [part if isinstance(part, str) else part.get("text") for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise PreferenceError(f"{where}: a message holds something else than text")
            one["content"] = "".join(parts)
        found.append(one)
    return found


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def _shortened(error: object, width: int = 200) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= width else lines[0][:width] + "..."
