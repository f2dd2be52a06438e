"""Folders of models and of checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po.diagnostics.checkpoints import check_checkpoints
from fused_po.trainers.loading import load_model, load_tokenizer
from tests.fuzz.readers.common import Target, files_of, lazily, refusing, replaced

__all__ = ["MODELS"]


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, pad_token_id=0, **sizes))


def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        small().save_pretrained(folder)
        load_tokenizer("tiny", ["Is it red?"] * 4).save_pretrained(folder)
        return files_of(Path(folder))


def adapted() -> dict[str, bytes]:
    """An adapter beside its base model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small().save_pretrained(folder / "base")
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(folder)
        return {one: content for one, content in files_of(folder).items() if not one.startswith("base/")}


model_files, adapter_files, base_files = lazily(saved), lazily(adapted), lazily(saved)


def model(data: bytes, folder: Path) -> None:
    """A model with its tokenizer, a file of it broken."""
    replaced(model_files(), data, folder)
    with refusing(ValueError, str(folder)):
        tokenizer = load_tokenizer(str(folder), [])
        found = load_model(str(folder), tokenizer, 0)
        assert found.get_input_embeddings().weight.dtype == torch.float32


def adapter(data: bytes, folder: Path) -> None:
    """A folder that holds an adapter, a file of it broken."""
    base = folder / "base"
    for name, content in base_files().items():
        base.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    given = dict(adapter_files())
    config = given["adapter_config.json"].decode()
    start = config.index('"base_model_name_or_path": "') + len('"base_model_name_or_path": "')
    given["adapter_config.json"] = (config[:start] + str(base) + config[config.index('"', start) :]).encode()
    replaced(given, data, folder / "adapter")
    with refusing(ValueError, str(folder / "adapter")):
        load_model(str(folder / "adapter"), None, 0)


def checkpoints(data: bytes, folder: Path) -> None:
    """Two checkpoints, the second with a broken file."""
    replaced(model_files(), b"\x00\x01\xff\xff", folder / "first")
    for name, content in model_files().items():
        (folder / "first" / name).write_bytes(content)
    replaced(model_files(), data, folder / "second")
    with refusing(ValueError, str(folder)):
        assert check_checkpoints([folder / "second", folder / "first"]) > 0


BROKEN = tuple(
    bytes([file, way]) + rest
    for file in range(6)
    for way in range(3)
    for rest in (b"{}", b"\x00\x20\x03[]", b"\x01\x80")
)
MODELS = {
    "model": Target(model, BROKEN),
    "adapter": Target(adapter, BROKEN),
    "checkpoints": Target(checkpoints, BROKEN),
}
