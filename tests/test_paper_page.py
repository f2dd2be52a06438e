"""Every command of docs/paper.md runs, one after the other, with a tiny model and few pairs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest
import torch

from fused_po.cli import main
from fused_po.trainers.loading import load_tokenizer
from scripts import make_paper_page

PAGE = make_paper_page.PAGE.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
# sizes of a study, for those of the page
STUDY = {
    "held-out": 3,
    "steps": 2,
    "batch": 4,
    "micro-batch": 4,
    "generations": 2,
    "checkpoints": 2,
    "samples": 4,
    "max-length": 40,
    "max-new-tokens": 4,
    "dpo-lr": 0.01,
    "ppo-lr": 0.01,
}


def commands() -> list[list[str]]:
    lines = [line for kind, block in BLOCK.findall(PAGE) if kind == "bash" for line in block.splitlines()]
    return [shlex.split(line) for line in lines]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = [{"prompt": f"Say {word}.", "chosen": f"{word} it is", "rejected": "no"} for word in WORDS]
    tokenizer = load_tokenizer("tiny", [text for row in rows for text in row.values()])
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **ids))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (script,) = [block for kind, block in BLOCK.findall(PAGE) if kind == "python"]
    (tmp_path / "my_reward.py").write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path


def smaller(words: list[str]) -> list[str]:
    """The command with a tiny model, small sizes and one seed, and with its patterns as a shell expands them."""
    words = ["model" if word == "Qwen/Qwen3-1.7B" else word for word in words]
    words = [name for word in words for name in (sorted(glob(word)) if "*" in word else [word])]
    if words[1] == "study" and "--data" in words:
        words += [f"--{name}={value}" for name, value in STUDY.items()] + ["--device=cpu"]
        if "--seeds" in words:
            words[words.index("--seeds") + 1] = "1"
    if words[1] == "g":
        words += ["--examples=4", "--prompts=2", "--max-length=40", "--max-new-tokens=4", "--device=cpu"]
    return words


def test_the_commands_run_in_order(place: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: policies are not trained")
    shown = commands()
    assert [words[:2] for words in shown] == [["fused-po", name] for name in ["study", "study", "g", *["study"] * 3]]
    for words in shown:
        command = smaller(words)
        assert main(command[1:]) == 0, words
        if "--plan" in command:
            assert not (place / "study").exists()
    text = (place / "both" / "report.md").read_text(encoding="utf-8")
    said = " ".join(PAGE.split())
    for title in ("G over training", "Normalised G over training", "G by side", "G by weight third within a side"):
        assert f"### {title}" in text and title.removesuffix(" over training") in said
    for title in ("Win rates", "DPO without one component each", "GRPO without one component each"):
        assert f"### {title}" in text
    rates = json.loads((place / "study" / "win_rates.json").read_text(encoding="utf-8"))
    assert {row["method"] for row in rates} == {"dpo", "grpo"} and len(rates) == 10
    assert all(0.0 <= row["win_rate"] <= 1.0 for row in rates)
    assert any(path.suffix == ".png" for path in (place / "g-dpo").rglob("*"))
    for named in re.findall(r"`?(study/[\w/.-]+\.(?:jsonl|json|html))`?", PAGE):
        assert (place / named).is_file(), named


def test_each_model_fits_one_gpu() -> None:
    rows = [
        line.split("|")[1:-1]
        for line in PAGE.splitlines()
        if line.startswith(tuple(f"| {m}" for m in make_paper_page.MODELS))
    ]
    assert len(rows) == len(make_paper_page.MODELS) * len(make_paper_page.VARIANTS)
    for row in rows:
        # peaks stand before the first time
        peaks = [float(cell) for cell in row[2:] if re.fullmatch(r" \d+ ", cell)]
        assert len(peaks) == 5 and max(peaks) < 79


@pytest.mark.nightly
def test_the_table_is_that_of_the_shapes() -> None:
    assert make_paper_page.table() in PAGE
