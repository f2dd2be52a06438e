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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from fused_po.trainers.rows import (
    KEYS,
    PreferenceError,
    common,
    converted_row,
    documents_to_rows,
    layout_of,
    plain_messages,
    prompt_and_answers,
    row_of,
    shortened,
)

__all__ = ["PreferenceError", "Preferences", "counted", "load_preferences", "texts"]

# a hub id may hold dots too
_FILES = (".csv", ".tsv", ".parquet", ".arrow", ".json", ".jsonl", ".ndjson", ".txt")
_LISTS = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
_NUMBERS = datasets.Sequence(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {"ids": _LISTS, "starts": _NUMBERS, "signs": _NUMBERS, "tokens": _NUMBERS, "notes": datasets.Value("string")}
)


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
    first = next(
        (row for n, one in _numbered(raw, source) if (row := row_of(one, f"{source}: row {n}")) is not None),
        None,
    )
    if first is None:
        raise PreferenceError(f"{source}: holds no pair")
    layout = layout_of(first)
    converted = converted_row(first, layout, bool(tokenizer.chat_template), f"{source}: the first row")
    if "completion" in converted and not single:
        raise PreferenceError(f"{source}: holds single answers (completion, label), the loss takes pairs")
    chat = any(isinstance(converted.get(key), list) for key in KEYS)
    refuse, paired = on_too_long == "refuse", "completion" not in converted
    encoder = _Encoder(tokenizer, source, layout, chat, single, max_length, refuse, vocabulary, paired)
    # of errors of any kind, those of our own are not hidden
    with _reading(source, (ValueError, RuntimeError, OSError)):
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
        raise PreferenceError(f"{source}: holds no pair that can be learned ({counted(counts) or 'all lines blank'})")
    return Preferences(encoded.remove_columns("notes"), counts, layout)


def texts(source: str, rows: int | None = None) -> Iterator[str]:
    """All texts of a source, for a tokenizer that is trained on them."""
    layout = None
    for number, record in _numbered(_read(source, rows), source):
        where = f"{source}: row {number}"
        if row := row_of(record, where):
            layout = layout_of(row) if layout is None else layout
            row = converted_row(row, layout, True, where)
            answers, _ = prompt_and_answers(row, isinstance(row.get("chosen", row.get("completion")), list), where)
            for value in (row["prompt"], *answers):
                yield from (
                    (value,)
                    if isinstance(value, str)
                    else (m.get("content") or "" for m in plain_messages(value, where))
                )


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
    paired: bool

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
            row = row_of(dict(zip(columns, values, strict=True)), where)
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
        row = converted_row(row, self.layout, bool(self.tokenizer.chat_template), where)
        answers, signs = prompt_and_answers(row, self.chat, where)
        if (len(answers) == 2) != self.paired:
            first, here = ("a pair", "a single answer") if self.paired else ("a single answer", "a pair")
            raise PreferenceError(f"{where}: {here}, where the first row has {first}")
        prompt, odd = row["prompt"], []
        odd += ["identical answers"] if len(answers) == 2 and answers[0] == answers[1] else []
        odd += ["empty answers"] * sum(answer in ("", []) for answer in answers)
        try:
            if self.chat:
                tools = json.loads(tools) if isinstance(tools := row.get("tools"), str) and tools else tools or None
                options = {"tools": tools, "tokenize": False, **(row.get("chat_template_kwargs") or {})}
                render, head, *tail = (
                    self.tokenizer.apply_chat_template,
                    *(plain_messages(one, where) for one in (prompt, *answers)),
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
            raise PreferenceError(f"{where}: the chat template refuses it ({shortened(error)})") from None
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
        starts = [common(prompt, ids) for ids in answers]
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
    with _reading(source):
        if path.is_file() and kind in (".csv", ".tsv"):
            options |= {"sep": "," if kind == ".csv" else "\t", "keep_default_na": False, "encoding": "utf-8-sig"}
            names = datasets.load_dataset("csv", split=split, **{**options, "streaming": True}).take(1).to_list()[0]
            # an answer of digits is a text
            options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
            found = datasets.load_dataset("csv", split=split, **options)
        elif path.is_file() and kind in (".parquet", ".arrow"):
            found = datasets.load_dataset(kind[1:], split=split, **options)
            _validate(found)
        elif path.is_file():
            # a byte that is not UTF-8 becomes an escape that JSON does not know, and its row is refused
            options |= {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace"}
            options["sample_by"] = "document" if kind == ".json" else "line"
            found = datasets.load_dataset("text", split=split, **options)
            found = found.map(documents_to_rows, batched=True, batch_size=1) if kind == ".json" else found
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
            _validate(found)
        elif not path.exists() and (kind in _FILES or source.startswith((".", "/", "~"))):
            raise FileNotFoundError("no such file or folder")
        else:
            name, _, other = source.partition(":")
            found = datasets.load_dataset(name, split=other or split, streaming=rows is not None)
        return found if rows is None else datasets.Dataset.from_list(list(found.take(rows)))


def _validate(found: Any) -> None:
    """Tables are taken as they are: lengths and offsets of a broken one lead anywhere in memory."""
    if isinstance(found, datasets.Dataset):
        found.data.validate(full=True)


@contextmanager
def _reading(source: str, kinds: Any = Exception) -> Iterator[None]:
    """What datasets and its readers raise, which has no common base, as a refusal; or errors of some kinds."""
    try:
        yield
    except PreferenceError:
        raise
    except kinds as error:
        raise PreferenceError(f"{source}: can't be read ({shortened(error.__cause__ or error)})") from None


def _numbered(raw: Any, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows from 1 on. Only where it is taken out of its table a value shows whether it is text."""
    rows, number = iter(raw), 0
    while True:
        with _reading(source):
            row = next(rows, None)
        if row is None:
            return
        yield (number := number + 1), row


def counted(counts: Mapping[str, int]) -> str:
    """Rows by reason, in words; empty without any."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
