"""Reading, tokenizing and padding preference pairs; and what is said of files that can't be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fused_po.trainers.loading import load_tokenizer
from fused_po.trainers.preferences import PreferenceError, Preferences, TokenPair, collate, mismatched

ROW = {"prompt": "Say hello.", "chosen": "Hello there!", "rejected": "No."}
CHAT = {
    "prompt": [{"role": "user", "content": "Say hello."}],
    "chosen": [{"role": "assistant", "content": "Hello there!"}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny", ["Say hello. Hello there! No."] * 4)


def write(path: Path, *rows: object) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path, tokenizer, max_length: int = 100, on_too_long: str = "truncate") -> Preferences:
    return Preferences.read(path, tokenizer, max_length, on_too_long)


def test_strings(tmp_path, tokenizer):
    (pair,) = read(write(tmp_path / "a.jsonl", ROW), tokenizer).pairs
    assert tokenizer.decode(pair.prompt) == "Say hello."
    assert tokenizer.decode(pair.chosen) == "Hello there!<|end|>"
    assert pair.rejected[-1] == tokenizer.eos_token_id


def test_chat_messages(tmp_path, tokenizer):
    (pair,) = read(write(tmp_path / "a.jsonl", CHAT), tokenizer).pairs
    assert tokenizer.decode(pair.prompt) == "<|user|>Say hello.<|end|><|assistant|>"
    assert tokenizer.decode(pair.chosen) == "Hello there!<|end|>"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "holds no pair"),
        (("", "  "), "holds no pair"),
        ((ROW, "{not json"), r"a.jsonl:2: not JSON"),
        ((ROW, "", '["a"]'), r"a.jsonl:3: an object is wanted, got list"),
        (({"prompt": "a", "chosen": "b"},), r"a.jsonl:1: no rejected"),
        (({},), "no prompt, chosen, rejected"),
        (({**ROW, "chosen": 3},), "a.jsonl:1: prompt, chosen and rejected must be strings, or lists of chat messages"),
        (({**CHAT, "chosen": "text"},), "all three"),
        (({**CHAT, "prompt": [{"role": "user"}]},), "all three"),
    ],
)
def test_bad_files(tmp_path, tokenizer, rows, message):
    with pytest.raises(PreferenceError, match=message):
        read(write(tmp_path / "a.jsonl", *rows), tokenizer)


def test_files_that_can_not_be_read(tmp_path, tokenizer):
    with pytest.raises(PreferenceError, match=r"none.jsonl: can't be read"):
        read(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PreferenceError, match=r"latin.jsonl: can't be read"):
        read(tmp_path / "latin.jsonl", tokenizer)


def test_chat_needs_a_template(tmp_path):
    bare = load_tokenizer("tiny", ["Say hello."])
    bare.chat_template = None
    with pytest.raises(PreferenceError, match="need a tokenizer with a chat template"):
        read(write(tmp_path / "a.jsonl", CHAT), bare)


def test_odd_pairs_are_kept_and_counted(tmp_path, tokenizer):
    empty = {"prompt": "Say hello.", "chosen": "", "rejected": "No."}
    same = {"prompt": "", "chosen": "No.", "rejected": "No."}
    found = read(write(tmp_path / "a.jsonl", ROW, empty, same), tokenizer)
    assert len(found.pairs) == 3
    assert found.counts == {"empty": 1, "identical": 1}
    assert found.pairs[1].chosen == [tokenizer.eos_token_id]
    # an empty prompt still leaves something to predict the first token from
    assert len(found.pairs[2].prompt) == 1


def test_long_pairs_are_cut_or_refused(tmp_path, tokenizer):
    row = {"prompt": "hello " * 30, "chosen": "there " * 40, "rejected": "No."}
    path = write(tmp_path / "a.jsonl", ROW, row)
    found = read(path, tokenizer, max_length=24)
    assert found.counts["truncated"] == 1
    whole = read(path, tokenizer, max_length=1000).pairs[1]
    pair = found.pairs[1]
    assert pair.prompt == whole.prompt[-12:]
    assert pair.chosen == whole.chosen[:12] and pair.rejected == whole.rejected
    with pytest.raises(PreferenceError, match=r"pair 2 has \d+ tokens, more than 24"):
        read(path, tokenizer, max_length=24, on_too_long="refuse")


def test_collate_shifts_and_masks():
    pairs = [TokenPair([5, 6], [7, 8], [9]), TokenPair([4], [3], [])]
    batch = collate(pairs, pad=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [4, 3, 0, 0], [5, 6, 9, 0], [4, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    ignored = -100
    assert batch.labels.tolist() == [[ignored, 7, 8], [3, ignored, ignored], [ignored, 9, ignored], [ignored] * 3]
    assert batch.labels.dtype == torch.int64


def test_mismatched_pairs_have_the_answers_of_the_next():
    pairs = [TokenPair([i], [10 + i], [20 + i]) for i in range(3)]
    assert [(p.prompt, p.chosen) for p in mismatched(pairs)] == [([0], [11]), ([1], [12]), ([2], [10])]
