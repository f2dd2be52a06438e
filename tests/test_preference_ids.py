"""Token ids of preferences are those of the installed TRL, row by row; and where they are not, on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from fused_po.trainers.data import load_preferences
from tests.tokenizers_of_kinds import KINDS, STRIPPING, tokenizer_of

pytest.importorskip("trl", reason="TRL runs on Python 3.11 and later")
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

PAIRS = [
    ("Say hello.", "Hello there!", "No."),
    ("Say hello.", " Hello there!", " No."),
    ("Say hello. ", "Hello there!", "No."),
    ("Say hello.\n", "\nHello", "\n\nNo"),
    ("", "Hello there!", "No."),
    ("Say", "", "No."),
    ("Say", "", ""),
    ("Say hello.", "Hello{end}", "No."),
    ("Say hello.", "Hello{end}", "No.{end}"),
    ("Say{end}", "Hello", "No."),
    ("Say", "{end}Hello", "No."),
    ("Say", "Hello {end} there", "No."),
    ("def f(", "cat):", "dog):"),
    ("def f(", "cat):", "c):"),
    ("un", "happy", "hinged"),
    ("hel", "lo", "p"),
    ("hel", "lo", ""),
    ("1", "2", "3"),
    ("12", "345", "34"),
    ("Grüß", "e dich", "e Gott"),
    ("日本", "語", "人"),
    ("family: \U0001f469\u200d", "\U0001f469\u200d\U0001f467", "\U0001f468"),
    ("tab\t", "\tx", "\ty"),
    ("line\r\n", "\r\nx", "y"),
    ("sep\u2028", "\u2029x\u0085", "y"),
    ("e\u0301", "\u0301", "x"),
    ("   ", "   ", " "),
    ("Say", " ", "  "),
    ("same", "same", "same"),
    ("Say hello to everyone there in a rather long sentence.", "Hello", "No"),
    ("Say hello.", "Hello " * 40, "No."),
    ("Say " * 40, "Hello", "No."),
    ("[CLS] <s> <|user|>", "[SEP] </s> <|end|>", "<unk>"),
]
BARE = [
    ("\n\nHuman: Hi.\n\nAssistant: Hello.", "\n\nHuman: Hi.\n\nAssistant: No."),
    ("Hi there friend", "Hi there you"),
    ("Hi same", "Hi same"),
    ("Hi", "Hi there"),
]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHATS = [
    ([message("user", a)], [message("assistant", b)], [message("assistant", c)])
    for a, b, c in PAIRS
    if "{end}" not in a
] + [
    (
        [message("system", "Be kind."), message("user", "Hi"), message("assistant", "Ho"), message("user", "And?")],
        [message("assistant", "Yes"), message("user", "why"), message("assistant", "so")],
        [message("assistant", "No")],
    ),
    (
        [message("user", "Hi"), message("assistant", "Well, ")],
        [message("assistant", "yes")],
        [message("assistant", "no")],
    ),
]
ALL_TEXTS = [text for row in PAIRS for text in row] + [text for row in BARE for text in row]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Any:
    return tokenizer_of(request.param, ALL_TEXTS)


def rows_of(kind: str, end: str) -> list[dict[str, Any]]:
    if kind == "text":
        return [
            dict(zip(("prompt", "chosen", "rejected"), (text.replace("{end}", end) for text in row), strict=True))
            for row in PAIRS
        ]
    if kind == "bare":
        return [dict(zip(("chosen", "rejected"), row, strict=True)) for row in BARE]
    if kind == "chat":
        return [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in CHATS]
    return [{"chosen": prompt + chosen, "rejected": prompt + rejected} for prompt, chosen, rejected in CHATS]


def by_trl(trainer: Any, rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[Any]:
    """(ids of prompt and answer, where the answer begins) of each answer, as TRL's own collator cuts them."""
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start", per_device_train_batch_size=2
    )
    own = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    found = trainer._prepare_dataset(own, datasets.Dataset.from_list(rows), tokenizer, args, "train")
    sides = [side for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in found.column_names]
    return [[((row["prompt_ids"] + row[side])[:max_length], len(row["prompt_ids"])) for side in sides] for row in found]


def by_us(rows: list[dict[str, Any]], tokenizer: Any, path: Path, **options: Any) -> list[Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = load_preferences(str(path), tokenizer, **options).rows
    return [list(zip(row["ids"], row["starts"], strict=True)) for row in found]


def learned(rows: list[Any]) -> list[Any]:
    """Rows with something to learn: TRL keeps the others, which carry no loss."""
    return [row for row in rows if any(len(ids) > max(1, start) for ids, start in row)]


def expected(trainer: Any, rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[Any]:
    """What TRL makes of rows, without the second end token of texts that the tokenizer ends itself."""
    if tokenizer.eos_token != "[SEP]" or not isinstance(next(iter(rows[0].values())), str):
        return learned(by_trl(trainer, rows, tokenizer, max_length))
    found = []
    for row in by_trl(trainer, rows, tokenizer, 1000):
        once = [ids[:-1] if ids[-2:] == [3, 3] else ids for ids, _ in row]
        start = min(min(begin, len(ids) - 1) for ids, (_, begin) in zip(once, row, strict=True))
        if start < max_length:
            found.append([(ids[:max_length], start) for ids in once])
    return learned(found)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", ["text", "bare", "chat", "bare chat"])
def test_pairs(tokenizer, kind, cut, tmp_path):
    tokenizer.chat_template = STRIPPING
    max_length = 1000 if not cut else 45 if "chat" in kind else 12
    rows = rows_of(kind, tokenizer.eos_token)
    ours = by_us(rows, tokenizer, tmp_path / "rows.jsonl", max_length=max_length)
    assert ours == expected(DPOTrainer, rows, tokenizer, max_length)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_single_answers(tokenizer, kind, tmp_path):
    tokenizer.chat_template = STRIPPING
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows_of(kind, tokenizer.eos_token)
        for side in ("chosen", "rejected")
        # the end of a prompt that the tokenizer adds would pass for that of the answer
        if tokenizer.eos_token != "[SEP]" or not str(row[side]).startswith("[SEP]")
    ]
    ours = by_us(rows, tokenizer, tmp_path / "rows.jsonl", single=True, max_length=1000)
    assert ours == expected(KTOTrainer, rows, tokenizer, 1000)
