"""Files of preferences."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import zstandard

from fused_po.trainers.data import PreferenceError, load_preferences, texts
from fused_po.trainers.loading import load_tokenizer
from tests.fuzz.readers.common import Draw, Target, files_of, lazily, refusing, replaced

__all__ = ["PREFERENCES"]

LENGTH = 24
PAIRS: list[dict[str, Any]] = [
    {"prompt": "Is it red?", "chosen": "Yes, it is.", "rejected": "Go away."},
    {"prompt": "Wärme 暖?", "chosen": "Yes.", "rejected": ""},
]
SINGLE = [{"prompt": "Is it red?", "completion": "Yes.", "label": True}]
TURNS = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes."}]
CHAT: list[dict[str, Any]] = [{"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{**TURNS[1], "content": "No."}]}]
OTHERS: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": "Red?"}], "chosen": {"from": "gpt", "value": "Yes."}}
    | {"rejected": {"from": "gpt", "value": "No."}},
    {"instruction": "Say yes", "input": "now", "chosen": "yes", "rejected": "no"},
    {"prompt": "Is it red?", "chosen": TURNS, "rejected": [*TURNS[:1], {"role": "assistant", "content": "No."}]},
    {**CHAT[0], "tools": "[]", "chat_template_kwargs": {"a": 1}},
    {**CHAT[0], "prompt": [{"role": "user", "content": [{"type": "text", "text": "Red?"}]}]},
]
FILES = [PAIRS, SINGLE, CHAT, *([one] for one in OTHERS)]
WORDS = (
    *('"prompt"', '"chosen"', '"rejected"', '"completion"', '"label"', '"role"', '"content"', '"tools"', '"from"'),
    *('"value"', '"conversations"', '"instruction"', '"system"', '"kto_tag"', "null", "true", "[]", "{}", "\\ud800"),
    *("NaN", "1e999", "\u2028", "\ufeff", '"chat_template_kwargs"', '"text"', "\\u0000"),
)

tokenizer = lazily(lambda: load_tokenizer("tiny", ["Is it red? Yes, it is. Go away."] * 4))


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], write: Callable[[Any, Any], None]) -> bytes:
    sink = io.BytesIO()
    write(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def stream(found: Any, sink: Any) -> None:
    with pyarrow.ipc.new_stream(sink, found.schema) as writer:
        writer.write_table(found)


def load(source: Path, single: bool = True, rows: int | None = None, **options: Any) -> None:
    """Read a file into a cache of its own; what comes of it must keep the promises of ``Preferences``."""
    with tempfile.TemporaryDirectory(dir=source.parent) as cache:
        before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, Path(cache)
        try:
            # as the training does for a tokenizer of its own
            with refusing(PreferenceError, str(source)):
                assert all(isinstance(text, str) for text in texts(str(source), rows))
            with refusing(PreferenceError, str(source)):
                given = {"single": single, "max_length": LENGTH, "rows": rows, **options}
                check(load_preferences(str(source), tokenizer(), **given), single)
        finally:
            datasets.config.HF_DATASETS_CACHE = before


def check(found: Any, single: bool) -> None:
    assert len(found.rows) > 0
    sides = len(found.rows[0]["ids"])
    assert single or sides == 2
    for row in found.rows:
        assert row["signs"] in ([[1, -1]] if sides == 2 else [[1], [-1]])
        assert len(row["ids"]) == len(row["starts"]) == len(row["tokens"]) == sides
        assert single or row["starts"][0] == row["starts"][1]
        assert sum(row["tokens"]) > 0
        for ids, start, count in zip(row["ids"], row["starts"], row["tokens"], strict=True):
            assert len(ids) <= LENGTH and 0 <= start < LENGTH
            assert count == max(0, len(ids) - max(start, 1))
            assert all(0 <= token < len(tokenizer()) for token in ids)
    assert all(count > 0 for count in found.counts.values())


def of_suffix(suffix: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        path = folder / f"pairs{suffix}"
        path.write_bytes(data)
        load(path)

    return run


def packed(data: bytes, folder: Path) -> None:
    """Packed, whole or broken: the first byte says how."""
    draw = Draw(data)
    suffix, broken = draw.one([".gz", ".zst", ".bz2", ".xz"]), draw.number(4)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    content = draw.rest()
    content = content if broken == 1 else pack(content)
    path = folder / f"pairs.jsonl{suffix}"
    path.write_bytes(content[: len(content) // 2] if broken == 2 else content)
    load(path)


ODD = (None, True, 0, -1.5, 10**30, "", " ", "é\u2028", "\ud800", "a\x00b", "<|end|>", [], {}, [None], [[]], "x" * 200)
NAMES = (
    *("prompt", "chosen", "rejected", "completion", "label", "conversations", "instruction", "input", "output"),
    *("system", "kto_tag", "tools", "chat_template_kwargs", "text", "other"),
)


def value(draw: Draw, depth: int = 0) -> Any:
    kind = draw.number(8 if depth < 3 else 4)
    if kind < 2:
        return draw.one(["Is it red?", "Yes, it is.", "No.", "Is it red? Yes."])
    if kind < 4:
        return draw.one(ODD)
    if kind == 4:
        return [value(draw, depth + 1) for _ in range(draw.number(3))]
    if kind == 5:
        return {
            draw.one(["role", "content", "from", "value", "type", "text"]): value(draw, 2)
            for _ in range(draw.number(4))
        }
    turns: list[Any] = []
    for _ in range(1 + draw.number(3)):
        turn: dict[str, Any] = {"role": draw.one(["user", "assistant", "system", "tool"]), "content": value(draw, 2)}
        turns.append(turn if kind == 6 else {"from": draw.one(["human", "gpt"]), "value": value(draw, 2)})
    return turns


def drawn_rows(data: bytes, folder: Path) -> None:
    """Rows that are nearly right, as lines, as a document, or as a table with columns of one type."""
    draw = Draw(data)
    way, single, stream_rows = draw.number(4), bool(draw.number(2)), draw.number(4) or None
    refuse = {"on_too_long": "refuse"} if draw.number(4) == 1 else {}
    rows = []
    for _ in range(1 + draw.number(4)):
        row = dict(draw.one(draw.one(FILES)))
        for _ in range(draw.number(4)):
            name = draw.one(NAMES)
            if draw.number(4) == 1:
                row.pop(name, None)
            else:
                row[name] = value(draw)
        rows.append(row)
    if way < 2:
        path = folder / ("pairs.jsonl" if way == 0 else "pairs.json")
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in rows) if way == 0 else json.dumps(rows), encoding="utf-8"
        )
    else:
        try:
            found = table(rows, pyarrow.parquet.write_table if way == 2 else stream)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
            # no table has such columns
            return
        path = folder / ("pairs.parquet" if way == 2 else "pairs.arrow")
        path.write_bytes(found)
    load(path, single, stream_rows, **refuse)


def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_list(PAIRS).save_to_disk(folder)
        return files_of(Path(folder))


saved_files = lazily(saved)


def saved_folder(data: bytes, folder: Path) -> None:
    """What ``save_to_disk`` wrote, a file of it broken."""
    replaced(saved_files(), data, folder / "saved")
    load(folder / "saved")


def csv(rows: list[dict[str, Any]]) -> bytes:
    names = list(rows[0])
    return "".join(",".join(f'"{one}"' for one in row) + "\n" for row in [names, *map(dict.values, rows)]).encode()


documents = tuple(json.dumps(rows).encode() for rows in FILES)
PREFERENCES = {
    "jsonl": Target(of_suffix(".jsonl"), tuple(map(lines, FILES)), WORDS),
    "json": Target(of_suffix(".json"), (*documents, b'{"data": [], "version": 1}'), WORDS),
    "csv": Target(of_suffix(".csv"), (csv(PAIRS), csv(SINGLE)), ("prompt", "chosen", "rejected", '""')),
    "parquet": Target(
        of_suffix(".parquet"), tuple(table(rows, pyarrow.parquet.write_table) for rows in (PAIRS, SINGLE, CHAT))
    ),
    "arrow": Target(of_suffix(".arrow"), tuple(table(rows, stream) for rows in (PAIRS, SINGLE, CHAT))),
    "packed": Target(packed, tuple(bytes([kind, how]) + lines(PAIRS) for kind in range(4) for how in range(3)), WORDS),
    "rows": Target(
        drawn_rows,
        tuple(bytes([way]) + bytes(range(40 * seed, 40 * seed + 40)) for way in range(4) for seed in range(5)),
    ),
    "saved": Target(saved_folder, tuple(bytes([file, way]) + b"{}" for file in range(3) for way in range(3))),
}
