"""Five steps of LLaMA-Factory's own DPO and KTO trainers, as they are and after ``llamafactory.enable()``:
``python tests/oracles/compare_llamafactory.py`` from the repository.

A script and not a test, since LLaMA-Factory pins TRL to 0.24 and transformers to 5.6. It prints the largest relative
difference of losses, gradient norms and metrics, and fails where a loss differs by 1e-5 or a norm by 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Seq2SeqTrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llamafactory.hparams import FinetuningArguments
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.kto.trainer import CustomKTOTrainer

from fused_po.trainers import llamafactory as ours
from fused_po.trainers.loading import load_tokenizer

STEPS, PAIRS, V = 5, 4, 89
TIMES = ("runtime", "per_second", "flos", "epoch")
DPO: dict[str, dict[str, Any]] = {
    **{name: {"pref_loss": name} for name in ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")},
    "sft term": {"pref_ftx": 0.3},
    "bco": {"pref_bco_weight": 0.4},
    "ld_alpha": {"ld_alpha": 0.4},
    "lora": {"lora": True},
    "capped": {"gemma": True},
}
KTO: dict[str, dict[str, Any]] = {"kto": {}, "kto weights": {"kto_chosen_weight": 1.3}, "kto sft": {"pref_ftx": 0.2}}


def tiny(gemma: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    if gemma:
        from transformers import Gemma2Config, Gemma2ForCausalLM

        config = Gemma2Config(vocab_size=V, num_key_value_heads=2, head_dim=16, **sizes)
        config.final_logit_softcapping = 3.0
        return Gemma2ForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes))


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def answers(rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of 12 tokens, of which the last 4 to 8 are the answer."""
    ids = torch.randint(3, V, (rows, 12), generator=generator)
    lengths = torch.randint(4, 9, (rows, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(12) < 12 - lengths, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(STEPS):
        batch = answers(2 * PAIRS, generator)
        if kind == "kto":
            batch["kto_tags"] = torch.arange(2 * PAIRS) % 3 > 0
            batch |= {f"kl_{name}": value for name, value in answers(2 * PAIRS, generator).items()}
        found.append(batch)
    return found


def run(kind: str, folder: str, enable: bool, lora: bool = False, gemma: bool = False, **settings: Any) -> list[dict]:
    """What each step logs."""
    trainer = CustomDPOTrainer if kind == "dpo" else CustomKTOTrainer
    finetuning = FinetuningArguments(stage=kind, finetuning_type="lora" if lora else "full", **settings)
    model: Any = tiny(gemma)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with_reference = not lora and (kind == "kto" or finetuning.use_ref_model)
    arguments = Seq2SeqTrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=1, learning_rate=0.05, optim="sgd",
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, seed=3,
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    tokenizer: PreTrainedTokenizerFast = load_tokenizer("tiny", ["yes no"])
    finetuning.disable_shuffling = True
    with ours.enable() if enable else nullcontext():
        made = trainer(
            model=model, ref_model=perturbed(tiny(gemma)) if with_reference else None, args=arguments,
            finetuning_args=finetuning, processor=None, tokenizer=tokenizer,
            train_dataset=batches(kind), data_collator=lambda rows: rows[0],
        )  # fmt: skip
        made.train()
        assert not enable or ours.calls() >= STEPS
    return [entry for entry in made.state.log_history if "loss" in entry]


def main() -> int:
    failed = False
    for kind, cases in (("dpo", DPO), ("kto", KTO)):
        for name, settings in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                theirs, mine = (run(kind, folder, enable, **settings) for enable in (False, True))
            assert len(theirs) == len(mine) == STEPS
            worst = {"loss": 0.0, "grad_norm": 0.0, "metrics": 0.0}
            for want, got in zip(theirs, mine, strict=True):
                assert want.keys() == got.keys()
                for key in want:
                    if not any(word in key for word in TIMES):
                        difference = abs(got[key] - want[key]) / max(abs(want[key]), 1e-2 if key != "loss" else 1.0)
                        field = key if key in worst else "metrics"
                        worst[field] = max(worst[field], difference)
            bad = worst["loss"] > 1e-5 or worst["grad_norm"] > 1e-4 or worst["metrics"] > 1e-3
            failed |= bad
            print(f"{name:12s}", *(f"{key} {value:.1e}" for key, value in worst.items()), "MISSED" if bad else "holds")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
