"""Reading preferences of every kind of file, what is said of those that can't be used, and batches of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fused_po.trainers.batches import collate
from fused_po.trainers.data import PreferenceError, Preferences, load_preferences, texts
from fused_po.trainers.loading import load_tokenizer

ROW = {"prompt": "Say hello.", "chosen": "Hello there!", "rejected": "No."}
USER, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "Say hello."), ("assistant", "Hello there!"), ("assistant", "No."))
)
CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
SINGLE = {"prompt": "Say hello.", "completion": "Hello there!", "label": True}
TEXT = ("Say hello.|Hello there!<|end|>", "Say hello.|No.<|end|>")
ASKED = "<|user|>Say hello.<|end|><|assistant|>"
TALK = (f"{ASKED}|Hello there!<|end|>", f"{ASKED}|No.<|end|>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny", ["Say hello. Hello there! No. name args f x weather"] * 4)


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def shown(found: Preferences, tokenizer: Any) -> list[tuple[str, ...]]:
    """Each row as its sequences in words, with a stroke where the answer begins."""
    parts = [
        [(ids[:start], ids[start:]) for ids, start in zip(row["ids"], row["starts"], strict=True)] for row in found.rows
    ]
    return [tuple("|".join(map(tokenizer.decode, pair)) for pair in row) for row in parts]


def written(folder: Path, name: str, content: bytes | Callable[[Path], Any]) -> str:
    path = folder / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return str(path)


def table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


LISTED = {
    "prompt": [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Hello there!"}]}],
    "rejected": [NO],
}
CONVERSATION = [{"from": "human", "value": "Say hello."}]
GOOD: dict[str, tuple[str, bytes | Callable[[Path], Any], tuple[str, ...]]] = {
    "jsonl": ("a.jsonl", lines(ROW), TEXT),
    "no suffix": ("pairs", lines(ROW), TEXT),
    "blank lines": ("a.jsonl", lines("", ROW, "  ", ""), TEXT),
    "no newline at the end": ("a.jsonl", lines(ROW)[:-1], TEXT),
    "windows newlines": ("a.jsonl", lines(ROW).replace(b"\n", b"\r\n"), TEXT),
    "byte-order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(ROW), TEXT),
    "gzip": ("a.jsonl.gz", gzip.compress(lines(ROW)), TEXT),
    "bzip2": ("a.jsonl.bz2", bz2.compress(lines(ROW)), TEXT),
    "xz": ("a.jsonl.xz", lzma.compress(lines(ROW)), TEXT),
    "json list": ("a.json", json.dumps([ROW], indent=1).encode(), TEXT),
    "json object": ("a.json", json.dumps({"version": 1, "data": [ROW]}).encode(), TEXT),
    "json that is lines": ("a.json", lines(ROW), TEXT),
    "json.gz": ("a.json.gz", gzip.compress(json.dumps([ROW]).encode()), TEXT),
    "csv": ("a.csv", b"prompt,chosen,rejected\nSay hello.,Hello there!,No.\n", TEXT),
    "csv with a mark": ("a.csv", b"\xef\xbb\xbfprompt,chosen,rejected\nSay hello.,Hello there!,No.\n", TEXT),
    "tsv": ("a.tsv", b"prompt\tchosen\trejected\nSay hello.\tHello there!\tNo.\n", TEXT),
    "parquet": ("a.parquet", lambda path: table([ROW]).to_parquet(str(path)), TEXT),
    "parquet of messages": ("a.parquet", lambda path: table([CHAT]).to_parquet(str(path)), TALK),
    "saved folder": ("saved", lambda path: table([ROW]).save_to_disk(str(path)), TEXT),
    "saved splits": ("saved", lambda path: datasets.DatasetDict(train=table([ROW])).save_to_disk(str(path)), TEXT),
    "folder of files": ("files", lambda path: (path.mkdir(), table([ROW]).to_parquet(str(path / "a.parquet"))), TEXT),
    "more columns": ("a.jsonl", lines({"id": 7, **ROW, "score": [1, {}], "tools": None}), TEXT),
    "messages": ("a.jsonl", lines(CHAT), TALK),
    "contents as lists": ("a.jsonl", lines(LISTED), TALK),
    "mixed contents": ("a.jsonl", lines(LISTED, CHAT), TALK),
    "no prompt": ("a.jsonl", lines({"chosen": "Say hello. Hello there!", "rejected": "Say hello. No."}), TEXT[:0]),
    "no prompt, messages": ("a.jsonl", lines({"chosen": [USER, YES], "rejected": [USER, NO]}), TALK),
    "prompt of None": ("a.jsonl", lines({"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]}), TALK),
    "UltraFeedback": (
        "a.jsonl",
        lines({"prompt": "Say hello.", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES]}),
        TALK,
    ),
    "UltraFeedback, answers alone": (
        "a.jsonl",
        lines({"prompt": "Say hello.", "chosen": [YES], "rejected": [NO]}),
        TALK,
    ),
    "ShareGPT": (
        "a.json",
        lines({"conversations": CONVERSATION, "chosen": {"from": "gpt", "value": "Hello there!"}, "rejected": NO}),
        TALK,
    ),
    "Alpaca": (
        "a.json",
        lines({"instruction": "Say hello.", "input": "", "chosen": "Hello there!", "rejected": "No."}),
        TALK,
    ),
    "single": ("a.jsonl", lines(SINGLE), TEXT[:1]),
    "single, label of 1": ("a.jsonl", lines({**SINGLE, "label": 1}), TEXT[:1]),
    "single, csv": ("a.csv", b"prompt,completion,label\nSay hello.,Hello there!,True\n", TEXT[:1]),
    "single, messages": ("a.jsonl", lines({"prompt": [USER], "completion": [YES], "label": False}), TALK[:1]),
    "single, ShareGPT": (
        "a.json",
        lines({"conversations": [*CONVERSATION, {"from": "gpt", "value": "Hello there!"}], "label": True}),
        TALK[:1],
    ),
    "single, Alpaca": (
        "a.json",
        lines({"instruction": "Say hello.", "output": "Hello there!", "kto_tag": True}),
        TALK[:1],
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_kinds_of_file(tmp_path, tokenizer, kind):
    name, content, wanted = GOOD[kind]
    found = load_preferences(written(tmp_path, name, content), tokenizer, single="single" in kind)
    wanted = wanted or ("Say hello.| Hello there!<|end|>", "Say hello.| No.<|end|>")
    assert shown(found, tokenizer)[0] == wanted
    assert len(found.rows) == (2 if kind == "mixed contents" else 1)
    named = next((layout for layout in ("ShareGPT", "Alpaca", "UltraFeedback") if layout in kind), "")
    assert found.layout == named


def test_zstandard(tmp_path, tokenizer):
    zstandard = pytest.importorskip("zstandard")
    path = written(tmp_path, "a.jsonl.zst", zstandard.compress(lines(ROW)))
    assert shown(load_preferences(path, tokenizer), tokenizer) == [TEXT]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_separators_inside_a_string_end_no_line(tmp_path, tokenizer, separator):
    row = {**ROW, "chosen": f"Hello{separator}there!"}
    path = written(tmp_path, "a.jsonl", json.dumps(row, ensure_ascii=False).encode() + b"\n" + lines(ROW))
    found = shown(load_preferences(path, tokenizer), tokenizer)
    assert found[0][0] == f"Say hello.|Hello{separator}there!<|end|>" and found[1] == TEXT


def test_tools_reach_the_template(tmp_path):
    own = load_tokenizer("tiny", ["Say hello. Hello there! No. tools weather"] * 4)
    own.chat_template = "{{ tools | tojson if tools else '' }}" + own.chat_template
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": {"a": 1}}},
        {"type": "function", "b": [1]},
    ]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}
    rows = [{**CHAT, "tools": tools}, {**CHAT, "tools": json.dumps(tools)}, {**CHAT, "chosen": [call]}]
    found = load_preferences(written(tmp_path, "a.jsonl", lines(*rows)), own).rows["ids"]
    assert found[0] == found[1] != found[2]
    assert own.decode(found[0][0]).startswith(json.dumps(tools))


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl: is empty"),
    "a header alone": ("a.csv", b"prompt,chosen,rejected\n", "a.csv: holds no pair"),
    "blank": ("a.jsonl", b"\n  \n", "a.jsonl: holds no pair"),
    "not JSON": ("a.jsonl", lines(ROW, "{not json"), "a.jsonl: row 2: not JSON"),
    "cut off": ("a.jsonl", lines(ROW)[:-10], "a.jsonl: row 1: not JSON"),
    "not an object": ("a.jsonl", lines(ROW, "", '["a"]'), "row 3: an object is wanted, got list"),
    "not UTF-8": ("a.jsonl", lines(ROW) + b'{"prompt": "a\xff", "chosen": "b", "rejected": "c"}\n', "row 2: not JSON"),
    "UTF-16": ("a.jsonl", lines(ROW).decode().encode("utf-16"), "row 1: not JSON"),
    "not gzip": ("a.jsonl.gz", lines(ROW), "a.jsonl.gz: "),
    "half a gzip": ("a.jsonl.gz", gzip.compress(lines(*[ROW] * 99))[:40], "a.jsonl.gz: can't be read"),
    "not parquet": ("a.parquet", lines(ROW), "a.parquet: can't be read"),
    "no rejected": ("a.jsonl", lines({"prompt": "a", "chosen": "b"}), "row 1: no rejected"),
    "rejected of None": ("a.jsonl", lines(ROW, {**ROW, "rejected": None}), "row 2: no rejected"),
    "nothing": ("a.jsonl", lines({}), "row 1: no chosen; wanted are prompt, chosen, rejected or"),
    "other columns": ("a.csv", b"question,good\na,b\n", "row 1: no chosen"),
    "their names": ("a.jsonl", lines({"question": "a", "good": "b"}), "completion, label, got question, good"),
    "a pair that lacks both": ("a.jsonl", lines(ROW, {"prompt": "a"}), "row 2: no chosen"),
    "a message without content": (
        "a.jsonl",
        lines(CHAT, {**CHAT, "chosen": [{"role": "assistant"}]}),
        "row 2: a message without content",
    ),
    "a number": (
        "a.jsonl",
        lines(ROW, {**ROW, "chosen": 3}),
        "row 2: chosen must be a string, as the first row has it",
    ),
    "text among messages": ("a.jsonl", lines(CHAT, {**CHAT, "chosen": "text"}), "row 2: chosen must be chat messages"),
    "messages among text": ("a.jsonl", lines(ROW, CHAT), "row 2: prompt must be a string, as the first row has it"),
    "no role": ("a.jsonl", lines({**CHAT, "prompt": [{"content": "a"}]}), "row 1: prompt must be chat messages"),
    "empty prompt list": ("a.jsonl", lines({**CHAT, "prompt": []}), "row 1: prompt is an empty list"),
    "an image": (
        "a.jsonl",
        lines(CHAT, {**CHAT, "prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}),
        "row 2: a message holds something else than text",
    ),
    "nothing in common": ("a.jsonl", lines({"chosen": "Hello", "rejected": "No"}), "row 1: no prompt, and chosen and"),
    "no messages in common": (
        "a.jsonl",
        lines({"chosen": [YES], "rejected": [NO]}),
        "row 1: no prompt, and chosen and",
    ),
    "half a surrogate": (
        "a.jsonl",
        lines(ROW, '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}'),
        "row 2: holds half",
    ),
    "5,000 digits": ("a.jsonl", lines(ROW, '{"prompt": ' + "9" * 5000 + "}"), "row 2: not JSON"),
    "deep nesting": ("a.jsonl", lines(ROW, "[" * 100_000), "row 2: nested too deeply"),
    "deep nesting in JSON": ("a.json", b"[" * 100_000, "row 1: nested too deeply"),
    "single answers": (
        "a.jsonl",
        lines(SINGLE),
        "a.jsonl: holds single answers (completion, label), the loss takes pairs",
    ),
    "ShareGPT, broken": (
        "a.jsonl",
        lines({"conversations": CONVERSATION, "chosen": {"value": "a"}, "rejected": {"from": "gpt"}}),
        "not as the ShareGPT rows of this file",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_in_one_sentence(tmp_path, tokenizer, kind):
    name, content, message = BAD[kind]
    with pytest.raises(PreferenceError) as refusal:
        load_preferences(written(tmp_path, name, content), tokenizer)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("label", ["maybe", None, 2])
def test_bad_labels(tmp_path, tokenizer, label):
    path = written(tmp_path, "a.jsonl", lines(SINGLE, {**SINGLE, "label": label}))
    with pytest.raises(PreferenceError, match="row 2: label must be true or false"):
        load_preferences(path, tokenizer, single=True)


def test_what_is_not_there(tokenizer):
    with pytest.raises(PreferenceError, match=r"none.jsonl: can't be read \(no such file or folder\)"):
        load_preferences("none.jsonl", tokenizer)


def test_templates_that_refuse(tmp_path):
    own = load_tokenizer("tiny", ["Say hello."])
    own.chat_template = "{% if messages[-1].role == 'user' %}ok{% else %}{{ raise_exception('roles') }}{% endif %}"
    with pytest.raises(PreferenceError, match=r"row 1: the chat template refuses it \(roles\)"):
        load_preferences(written(tmp_path, "a.jsonl", lines(CHAT)), own)
    own.chat_template = None
    with pytest.raises(PreferenceError, match="holds chat messages, and the tokenizer has no chat template"):
        load_preferences(written(tmp_path, "b.jsonl", lines(CHAT)), own)


def test_ids_beyond_the_embeddings(tmp_path, tokenizer):
    path = written(tmp_path, "a.jsonl", lines({"prompt": "a", "chosen": "b", "rejected": "c"}, ROW))
    with pytest.raises(PreferenceError, match=r"row 2: token \d+, the model has embeddings for 260"):
        load_preferences(path, tokenizer, vocabulary=260)


def test_a_tokenizer_without_an_end_token_is_served(tmp_path):
    own = load_tokenizer("tiny", ["Say hello. Hello there! No."] * 4)
    own.eos_token = None
    found = load_preferences(written(tmp_path, "a.jsonl", lines(ROW)), own)
    assert shown(found, own) == [("Say hello.|Hello there!", "Say hello.|No.")]


def test_odd_rows_are_kept_and_counted(tmp_path, tokenizer):
    empty, same = {**ROW, "chosen": ""}, {"prompt": "", "chosen": "No.", "rejected": "No."}
    found = load_preferences(written(tmp_path, "a.jsonl", lines(ROW, empty, same)), tokenizer)
    assert len(found.rows) == 3
    assert found.counts == {"with an empty answer": 1, "with identical answers": 1}


def test_long_rows_are_cut_dropped_or_refused(tmp_path, tokenizer):
    long_answer, long_prompt = {**ROW, "chosen": "there " * 40}, {**ROW, "prompt": "hello " * 40}
    path = written(tmp_path, "a.jsonl", lines(ROW, long_answer, long_prompt))
    whole = load_preferences(path, tokenizer, max_length=1000).rows[1]
    found = load_preferences(path, tokenizer, max_length=24)
    assert found.counts == {"cut to the length": 1, "dropped: the prompt alone reaches the length": 1}
    assert found.rows[1]["ids"] == [ids[:24] for ids in whole["ids"]]
    assert [len(found.rows), found.rows[1]["starts"]] == [2, whole["starts"]]
    with pytest.raises(PreferenceError, match=r"row 2: \d+ tokens, more than 24"):
        load_preferences(path, tokenizer, max_length=24, on_too_long="refuse")
    with pytest.raises(PreferenceError, match="holds no row that can be learned"):
        load_preferences(path, tokenizer, max_length=1)


def test_a_stream_fetches_no_more_than_it_needs(tmp_path, tokenizer):
    path = written(tmp_path, "a.jsonl", lines(ROW, ROW, "{not json"))
    assert len(load_preferences(path, tokenizer, rows=2).rows) == 2
    with pytest.raises(PreferenceError, match="row 3"):
        load_preferences(path, tokenizer, rows=3)


def test_a_second_reading_takes_the_cache(tmp_path, tokenizer):
    path = written(tmp_path, "a.jsonl", lines(ROW))
    first = load_preferences(path, tokenizer).rows
    again = load_preferences(
        path, load_tokenizer("tiny", ["Say hello. Hello there! No. name args f x weather"] * 4)
    ).rows
    other = load_preferences(path, tokenizer, max_length=5).rows
    assert first.cache_files == again.cache_files != other.cache_files


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved", "files"])
def test_a_file_that_changed_in_the_same_moment_is_read_anew(tmp_path, tokenizer, kind):
    """To as many bytes, with the time of its last change put back: contents decide, not times."""

    def write(word: str) -> Path:
        rows = [{**ROW, "chosen": f"Hello {word}!"}]
        path = tmp_path / kind
        if kind == "saved":
            table(rows).save_to_disk(str(tmp_path / word))
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(tmp_path / word, path)
            (path / "state.json").write_text((tmp_path / "there" / "state.json").read_text())
        elif kind == "files":
            path.mkdir(exist_ok=True)
            table(rows).to_parquet(str(path / "a.parquet"))
        elif kind == "a.parquet":
            table(rows).to_parquet(str(path))
        else:
            csv = "\n".join(map(",".join, (rows[0], rows[0].values())))
            text = {"a.jsonl": json.dumps(rows[0]), "a.json": json.dumps(rows), "a.csv": csv}[kind]
            path.write_text(text + "\n")
        for one in (path, *path.rglob("*")):
            os.utime(one, (1e9, 1e9))
        return path

    first = shown(load_preferences(str(write("there")), tokenizer), tokenizer)
    second = shown(load_preferences(str(write("where")), tokenizer), tokenizer)
    assert first[0][0].endswith("there!<|end|>") and second[0][0].endswith("where!<|end|>")


def test_a_stream_is_kept_by_the_rows_that_were_fetched(tmp_path, tokenizer):
    path = written(tmp_path, "a.jsonl", lines(ROW, {**ROW, "chosen": "Hi."}, ROW))
    first, again, more = (load_preferences(path, tokenizer, rows=count).rows for count in (2, 2, 3))
    assert first.cache_files and first.cache_files == again.cache_files != more.cache_files


def test_columns_of_another_reference_are_named(tmp_path, tokenizer):
    path = written(tmp_path, "a.jsonl", lines({**ROW, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, ROW))
    found = load_preferences(path, tokenizer)
    assert found.counts == {"with log-probs of another reference, which are not read": 1}
    assert shown(found, tokenizer) == [TEXT, TEXT]


def test_processes_share_the_work(tmp_path, tokenizer):
    path = written(tmp_path, "a.jsonl", lines(*[{**ROW, "prompt": f"Say {n}"} for n in range(8)]))
    alone, shared = (load_preferences(path, tokenizer, num_proc=n).rows for n in (None, 2))
    assert alone.to_list() == shared.to_list()


def test_texts_are_those_of_prompts_and_answers(tmp_path):
    path = written(tmp_path, "a.jsonl", lines(LISTED))
    assert list(texts(path)) == ["Say hello.", "Hello there!", "No."]


def test_batches_shift_and_mask():
    pair = {"signs": [1, -1], "starts": [2, 2], "ids": [[5, 6, 7, 8], [5, 6, 9]], "ref": [[-1.0, -2.0], [-3.0]]}
    other = {"signs": [1, -1], "starts": [1, 1], "ids": [[4, 3], [4]], "ref": [[-4.0], []]}
    batch = collate([pair, other], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [4, 3, 0, 0], [5, 6, 9, 0], [4, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    ignored = -100
    assert batch["labels"].tolist() == [[ignored, 7, 8], [3, ignored, ignored], [ignored, 9, ignored], [ignored] * 3]
    assert batch["ref_logp"].tolist() == [[0, -1, -2], [-4, 0, 0], [0, -3, 0], [0, 0, 0]]
    assert batch["signs"].tolist() == [1, 1, -1, -1]


def test_a_hub_id_may_hold_dots(monkeypatch, tokenizer):
    """Only what ends as a file of data does is one that is not there."""
    asked: list[str] = []

    def load(name: str, **options: Any) -> datasets.Dataset:
        asked.append(name)
        return table([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_preferences("allenai/llama-3.1-tulu-3-8b", tokenizer).rows) == 1
    for name in ("none.jsonl", "none.csv.gz", "./none"):
        with pytest.raises(PreferenceError, match="no such file or folder"):
            load_preferences(name, tokenizer)
    assert asked == ["allenai/llama-3.1-tulu-3-8b"]
