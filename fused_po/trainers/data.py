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

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from fused_po.trainers.rows import Form, PreferenceError, Row, common, documents_to_rows, shortened

__all__ = [
    "PreferenceError",
    "Preferences",
    "checked_rows",
    "contents",
    "counted",
    "load_preferences",
    "mapped",
    "renderer",
    "texts",
]

# a hub id may hold dots too
_FILES = (".csv", ".tsv", ".parquet", ".arrow", ".json", ".jsonl", ".ndjson", ".txt")
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_NUMBERS = datasets.Sequence(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {"ids": datasets.Sequence(_NUMBERS)}
    | dict.fromkeys(("starts", "signs", "tokens"), _NUMBERS)
    | {"notes": datasets.Value("string")}
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
    """Read and tokenize preferences. Both steps are cached by contents.

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
    raw, content = _read(source, rows)
    form = Form.of(_numbered(raw, source), source, bool(tokenizer.chat_template))
    if not (form.paired or single):
        raise PreferenceError(f"{source}: holds single answers (completion, label), the loss takes pairs")
    if form.chat and not tokenizer.chat_template:
        raise PreferenceError(f"{source}: holds chat messages, and the tokenizer has no chat template")
    encoder = _Encoder(tokenizer, form, single, max_length, on_too_long == "refuse", vocabulary)
    # of errors of any kind, those of our own are not hidden
    with _reading(source, (ValueError, RuntimeError, OSError)):
        encoded = mapped(
            raw,
            encoder,
            [content, encoder.key],
            remove_columns=raw.column_names,
            features=_FEATURES,
            num_proc=num_proc if num_proc and num_proc > 1 else None,
            desc=f"tokenizing {Path(source).name}",
        )
    notes = encoded["notes"]
    counts = Counter(note for one in notes if one for note in one.split("; "))
    if any(name.startswith("dropped") for name in counts):
        encoded = encoded.select([index for index, one in enumerate(notes) if not one.startswith("dropped")])
    if not len(encoded):
        raise PreferenceError(f"{source}: holds no row that can be learned ({counted(counts) or 'all lines blank'})")
    return Preferences(encoded.remove_columns("notes"), counts, form.layout)


def checked_rows(source: str, template: bool, rows: int | None = None) -> Iterator[Row]:
    """The rows of a source, checked.

    Args:
        source: as in ``load_preferences``.
        template: whether the tokenizer has a chat template; Alpaca's rows become messages where it has.
        rows: stream: read this many and no more.

    Raises:
        PreferenceError: what can't be read or used.
    """
    raw, _ = _read(source, rows)
    form = Form.of(_numbered(raw, source), source, template)
    for number, record in _numbered(raw, source):
        if row := form.row(record, number):
            yield row


def texts(source: str, rows: int | None = None) -> Iterator[str]:
    """All texts of a source, for a tokenizer that is trained on them."""
    for row in checked_rows(source, True, rows):
        for value in (row.prompt, *row.answers):
            yield from (value,) if isinstance(value, str) else (message.get("content") or "" for message in value)


def renderer(tokenizer: Any, given: Mapping[str, Any]) -> Callable[..., str]:
    """What writes messages as text: the chat template, with what a row's other columns hold for it."""
    tools = given.get("tools") or None
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, "tokenize": False}
    return partial(tokenizer.apply_chat_template, **options | (given.get("chat_template_kwargs") or {}))


def mapped(rows: Any, function: Callable[..., Any], key: Any, **options: Any) -> Any:
    """``rows.map`` of a function on batches and indices, kept by a key that decides the outcome."""
    _cache().mkdir(parents=True, exist_ok=True)
    fingerprint = Hasher.hash(key)
    # rows in memory have no cache of their own
    options |= {"new_fingerprint": fingerprint, "cache_file_name": str(_cache() / f"{fingerprint}.arrow")}
    return rows.map(function, batched=True, with_indices=True, **options)


def _cache() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE, "fused_po")


@dataclass(frozen=True)
class _Encoder:
    """Maps batches of rows to token ids."""

    tokenizer: Any
    form: Form
    single: bool
    max_length: int
    refuse: bool
    vocabulary: int | None

    @property
    def key(self) -> list[Any]:
        """What decides the outcome beside the rows."""
        tokenizer, form = self.tokenizer, self.form
        fast = getattr(tokenizer, "backend_tokenizer", None)
        state = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
        added = getattr(tokenizer, "init_kwargs", {}).get("add_eos_token")
        own = [state, tokenizer.chat_template, tokenizer.eos_token, added, form.layout, form.chat, form.paired]
        return [3, *own, self.single, self.max_length, self.refuse, self.vocabulary]

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        records = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        found = (self.form.row(one, index + 1) for index, one in zip(indices, records, strict=True))
        rows = [row for row in found if row is not None]
        written = [self._texts(row) for row in rows]
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        flat = list(chain(*written))
        ids = self.tokenizer(flat, add_special_tokens=not self.form.chat, **options)["input_ids"] if flat else []
        tokenized = iter(ids)
        made = [
            self._row_of(row, *(next(tokenized) for _ in strings)) for row, strings in zip(rows, written, strict=True)
        ]
        return {name: [one[place] for one in made] for place, name in enumerate(_FEATURES)}

    def _texts(self, row: Row) -> list[str]:
        """The prompt, and the prompt with each answer, as the tokenizer is given them."""
        try:
            if self.form.chat:
                render = renderer(self.tokenizer, row.given)
                found = [render(row.prompt, add_generation_prompt=True)]
                found += [render(row.prompt + answer) for answer in row.answers]
            else:
                end = "" if self._ends else self.tokenizer.eos_token or ""
                answers = (answer if answer.endswith(end) else answer + end for answer in row.answers)
                found = [row.prompt, *(row.prompt + answer for answer in answers)]
            "".join(found).encode()
        except UnicodeEncodeError:
            raise PreferenceError(f"{row.where}: holds half of a surrogate pair, which is no text") from None
        except Exception as error:
            # a template may raise anything
            raise PreferenceError(f"{row.where}: the chat template refuses it ({shortened(error)})") from None
        return found

    @cached_property
    def _ends(self) -> bool:
        """The tokenizer ends what it encodes itself."""
        end = self.tokenizer.eos_token_id
        return end is not None and self.tokenizer("a")["input_ids"][-1:] == [end]

    def _row_of(self, row: Row, prompt: list[int], *answers: list[int]) -> tuple[Any, ...]:
        """The columns of a row, from the ids of its prompt, and of the prompt with each answer."""
        end = self.tokenizer.eos_token_id
        if self._ends and not self.form.chat:
            # the prompt's own end would pass for the first token of an empty answer
            prompt = prompt[:-1]
            answers = tuple(ids[:-1] if ids[-2:] == [end, end] else ids for ids in answers)
        starts = [common(prompt, ids) for ids in answers]
        starts = starts if self.single else [min(starts)] * len(starts)
        longest, largest = max(map(len, answers)), max(max(ids, default=0) for ids in answers)
        if self.refuse and longest > self.max_length:
            raise PreferenceError(f"{row.where}: {longest} tokens, more than {self.max_length}")
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise PreferenceError(f"{row.where}: token {largest}, the model has embeddings for {self.vocabulary}")
        kept = [ids[: self.max_length] for ids in answers]
        # the first token of all is predicted by nothing
        tokens = [max(0, len(ids) - max(start, 1)) for ids, start in zip(kept, starts, strict=True)]
        if max(starts) >= self.max_length or not any(tokens):
            long = max(starts) >= self.max_length
            return [], [], [], [], f"dropped: {'the prompt alone reaches the length' if long else 'no token to learn'}"
        notes = ["with identical answers"] if len(row.answers) == 2 and row.answers[0] == row.answers[1] else []
        notes += ["with an empty answer"] if not all(row.answers) else []
        notes += ["cut to the length"] if longest > self.max_length else []
        if any(name.startswith("ref_") and value is not None for name, value in row.given.items()):
            notes += ["with log-probs of another reference, which are not read"]
        return kept, starts, row.signs, tokens, "; ".join(notes)


def _read(source: str, rows: int | None) -> tuple[Any, str]:
    """The rows of a source as they are, those of JSON as one column of strings, ``text``; and what they are kept by."""
    path, split, streaming = Path(source).expanduser(), "train", rows is not None
    kind = next((s for s in reversed(path.suffixes) if s.lower() not in _PACKED), "").lower()
    if path.is_file() and not path.stat().st_size:
        raise PreferenceError(f"{source}: is empty")
    with _reading(source):
        # datasets keeps what it reads by the time of a file's last change; of a stream nothing is kept
        content = "" if streaming else contents(source)
        options: dict[str, Any] = {"streaming": streaming, "split": split}
        options |= {"cache_dir": str(_cache() / content[:32])} if content else {}
        if path.is_file():
            options["data_files"] = str(path)
            if not path.stat().st_size:
                raise PreferenceError(f"{source}: is empty")
        if path.is_file() and kind in (".csv", ".tsv"):
            options |= {"sep": "," if kind == ".csv" else "\t", "keep_default_na": False, "encoding": "utf-8-sig"}
            first = next(iter(datasets.load_dataset("csv", **options | {"streaming": True})), None)
            if first is None:
                raise PreferenceError(f"{source}: holds no pair")
            # an answer of digits is a text
            options["features"] = datasets.Features({name: datasets.Value("string") for name in first})
            found = datasets.load_dataset("csv", **options)
        elif path.is_file() and kind in (".parquet", ".arrow"):
            found = _validated(datasets.load_dataset(kind[1:], **options))
        elif path.is_file():
            # a byte that is not UTF-8 becomes an escape that JSON does not know, and its row is refused
            options |= {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace"}
            options["sample_by"] = "document" if kind == ".json" else "line"
            found = datasets.load_dataset("text", **options)
            found = found.map(documents_to_rows, batched=True, batch_size=1) if kind == ".json" else found
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
            found = _validated(found[split] if isinstance(found, datasets.DatasetDict) else found)
        elif not path.exists() and (kind in _FILES or source.startswith((".", "/", "~"))):
            raise PreferenceError(f"{source}: can't be read (no such file or folder)")
        else:
            name, _, other = source.partition(":")
            found = datasets.load_dataset(name, **options | {"split": other or split})
        found = found if rows is None else datasets.Dataset.from_list(list(found.take(rows)))
    return found, content or found._fingerprint


def _validated(found: Any) -> Any:
    """A table is taken as it is: lengths and offsets of a broken one lead anywhere in memory."""
    if isinstance(found, datasets.Dataset):
        found.data.validate(full=True)
    return found


@contextmanager
def _reading(source: str, kinds: Any = Exception) -> Iterator[None]:
    """What datasets and its readers raise, which has no common base, as a refusal; or errors of some kinds."""
    try:
        yield
    except PreferenceError:
        raise
    except kinds as error:
        said = shortened(error.__cause__ or error)
        if getattr(error.__cause__ or error, "errno", None) == errno.ENOSPC:
            raise PreferenceError(f"{source}: what is read can't be kept in {_cache()} ({said})") from None
        here = "" if Path(source).expanduser().exists() else "no file or folder here; "
        raise PreferenceError(f"{source}: can't be read ({here}{said})") from None


def _numbered(raw: Any, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows from 1 on. Only where it is taken out of its table a value shows whether it is text."""
    with _reading(source):
        yield from enumerate(raw, 1)


def counted(counts: Mapping[str, int]) -> str:
    """Rows by reason, in words; empty without any."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def contents(source: str) -> str:
    """A digest of a file, or of the files of a folder, by which what is made of them is kept; empty for a hub id."""
    path = Path(source).expanduser()
    digest = hashlib.sha256()
    for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
        # datasets keeps its caches beside the rows
        if one.is_file() and (one is path or not one.name.startswith(("cache-", "."))):
            digest.update(one.relative_to(path).as_posix().encode())
            with one.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest() if path.exists() else ""
