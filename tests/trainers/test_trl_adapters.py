"""Adapters under the trainers of one pass: a frozen one is an error, and the reference changes nothing about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from fused_po.trainers.trl import FusedDPOTrainer, FusedGRPOTrainer, FusedKTOTrainer
from tests.trainers.trl_runs import CONFIGS, PAIRS, TOKENIZER, lengths, tiny

TRAINERS = {"dpo": FusedDPOTrainer, "kto": FusedKTOTrainer, "grpo": FusedGRPOTrainer}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(tiny(), config).save_pretrained(folder)
    return folder


def trainer(kind: str, model: Any, folder: Path, **settings: Any) -> Any:
    common = {"max_steps": 2, "learning_rate": 0.05, "optim": "sgd", "seed": 3, "report_to": "none"}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1}
    more: dict[str, Any] = {}
    rows: list[dict[str, str]] = PAIRS
    if kind == "grpo":
        settings = {"num_generations": 4, "max_completion_length": 8, "beta": 0.1, **settings}
        rows, more = [{"prompt": row["prompt"]} for row in PAIRS], {"reward_funcs": lengths}
    options = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, **common, **quiet, **settings}
    config = CONFIGS[kind](output_dir=str(folder), **options)
    data = Dataset.from_list(rows)
    return TRAINERS[kind](model=model, args=config, train_dataset=data, processing_class=TOKENIZER, **more)


PRECOMPUTED = {"precompute_ref_log_probs": True}


@pytest.mark.parametrize(
    ("kind", "settings"), [("dpo", {}), ("kto", {}), ("grpo", {}), ("dpo", PRECOMPUTED), ("kto", PRECOMPUTED)]
)
def test_a_frozen_adapter_is_an_error(kind, settings, adapter, tmp_path):
    made = trainer(kind, PeftModel.from_pretrained(tiny(), adapter), tmp_path, **settings)
    with pytest.raises(ValueError, match=r"nothing is trained: .* frozen unless is_trainable=True"):
        made.train()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_trainable_adapter_is_trained_and_nothing_else(kind, adapter, tmp_path):
    model = PeftModel.from_pretrained(tiny(), adapter, is_trainable=True)
    kept = next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    made = trainer(kind, model, tmp_path)
    made.train()
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved and all(".default." in name for name in moved)
    # a part that its user froze stays so, though the reference's adapter was active in between
    assert not kept.requires_grad and not any(p is kept for name, p in model.named_parameters() if name in moved)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)
