"""Every script of the guides and of docs/training.md runs, with a tiny model in the place of the one that it names."""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from fused_po.trainers.loading import load_tokenizer
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = "Qwen/Qwen3-0.6B"
# a script names its model; other blocks are lines to show
SCRIPTS = {
    f"{page.stem}-{index}": block
    for page in sorted((ROOT / "docs" / "guides").glob("*.md"))
    for index, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    if NAMED in block
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer("tiny", list(SCRIPTS.values()))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, **sizes, **ids)
    model = Qwen3ForCausalLM(config)
    # a model of any use never says it, and a mask of what is no padding then has no hole
    model.generation_config.suppress_tokens = [tokenizer.pad_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# what they show runs inside a package whose pins fit into no environment of ours
ELSEWHERE = {"axolotl", "llamafactory"}


def test_there_are_scripts() -> None:
    pages = {name.rpartition("-")[0] for name in SCRIPTS}
    assert pages == {page.stem for page in (ROOT / "docs" / "guides").glob("*.md")} - ELSEWHERE and len(SCRIPTS) >= 12


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tiny: Path, tmp_path: Path) -> None:
    if "from trl" in SCRIPTS[name]:
        pytest.importorskip("trl", reason="TRL is not installed: its guide is not run")
    ends_well(SCRIPTS[name].replace(NAMED, str(tiny)), tmp_path)


def ends_well(text: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    done = python(str(script), cwd=tmp_path, HF_HUB_OFFLINE="1", WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_trainer_of_the_page_on_training(tiny: Path, tmp_path: Path) -> None:
    (block,) = BLOCK.findall((ROOT / "docs" / "training.md").read_text(encoding="utf-8"))
    assert block.count("max_steps=200") == 1 and block.count("bf16=True") == 1
    rows = [{"prompt": f"Say {word}.", "chosen": word, "rejected": "no"} for word in ("one", "two", "six", "ten")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    block = block.replace("max_steps=200", "max_steps=2").replace("bf16=True", "use_cpu=True")
    ends_well(f"path = {str(tiny)!r}\n{block}", tmp_path)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_shown_is_python_and_names_what_there_is(page: Path) -> None:
    """Of blocks that are too short to run, too."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "fused_po":
                module = import_module(str(node.module))
                for alias in node.names:
                    # a module that nobody has imported is no attribute yet
                    assert hasattr(module, alias.name) or import_module(f"{node.module}.{alias.name}")
