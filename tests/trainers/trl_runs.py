"""Short runs of TRL's trainers on a tiny model, as they are and on the fused path."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig, SFTConfig

from fused_po.trainers import trl as hooks
from fused_po.trainers.loading import load_tokenizer

STEPS = 5
PAIRS = [
    {"prompt": f"say {i} ", "chosen": "yes " * (i % 4 + 1), "rejected": "no never " * (i % 3 + 1)} for i in range(20)
]
TOKENIZER = load_tokenizer("tiny", [text for row in PAIRS for text in row.values()])
TOKENIZER.padding_side = "left"
TOKENIZER.model_input_names = ["input_ids", "attention_mask"]
CONFIGS = {"dpo": DPOConfig, "kto": KTOConfig, "grpo": GRPOConfig, "rloo": RLOOConfig, "sft": SFTConfig}
# of a run, not of a step
TIMES = ("runtime", "per_second", "step_time", "total_flos")


def tiny(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **sizes, **tokens, **options))


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """A reference that is not the policy, so that the first step is not the same for every loss."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def lengths(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group."""
    return [math.sin(sum(map(ord, text))) for text in completions]


def run(
    kind: str,
    trainer: type,
    folder: Any,
    *,
    enable: bool = False,
    model: Any = None,
    lora: bool = False,
    **settings: Any,
) -> list[dict[str, float]]:
    """What each step logs."""
    trained = tiny() if model is None else model()
    common = {"max_steps": STEPS, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "seed": 3}
    quiet = {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    exact = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4}
    arguments: dict[str, Any] = {"processing_class": TOKENIZER}
    extra: dict[str, Any] = {}
    if lora:
        arguments["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if kind in ("dpo", "kto") and not lora:
        reference = tiny() if model is None else model()
        arguments["ref_model"] = perturbed(reference)
    if kind in ("dpo", "kto", "sft"):
        rows = PAIRS if kind != "sft" else [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
    else:
        rows = [{"prompt": r["prompt"]} for r in PAIRS]
        arguments["reward_funcs"] = lengths
        # twice over the same rollouts, so that the ratio is not 1; answers end at different lengths
        extra = {"num_generations": 4, "max_completion_length": 8, "num_iterations": 2, "temperature": 0.9}
        if settings.get("beta"):
            # its reference is read from where the policy is
            trained.save_pretrained(folder / "policy")
            trained.config._name_or_path = str(folder / "policy")
            perturbed(trained)
    config = CONFIGS[kind](output_dir=str(folder / "out"), **{**common, **quiet, **exact, **extra, **settings})
    torch.manual_seed(1)
    with hooks.enable() if enable else nullcontext():
        made = trainer(model=trained, args=config, train_dataset=Dataset.from_list(rows), **arguments)
        made.train()
        assert not enable or hooks.calls() >= STEPS
    return [entry for entry in made.state.log_history if "loss" in entry]


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Losses to 1e-5, gradient norms to 1e-4 relative, every metric, at every step."""
    assert len(ours) == len(theirs) == STEPS
    # answers that are all worth the same leave a step of GRPO or RLOO without a gradient
    assert sum(entry["grad_norm"] > 1e-4 for entry in theirs) >= 3, "nothing is learned: nothing is compared"
    for step, (mine, want) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == want.keys()
        for name, value in want.items():
            if any(word in name for word in TIMES):
                continue
            if name == "loss":
                bound = 1e-5 * max(1.0, abs(value))
            elif name == "grad_norm":
                bound = 1e-4 * value + 1e-8
            else:
                bound = 1e-4 * abs(value) + 1e-5
            same_nan = isinstance(value, float) and math.isnan(value) and math.isnan(mine[name])
            assert same_nan or abs(mine[name] - value) <= bound, f"step {step}: {name} {mine[name]}, TRL {value}"
