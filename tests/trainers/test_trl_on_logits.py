"""Trainers that take log-probs from logits: CPO, ORPO and OnlineDPO of any TRL, and all trainers before 1.15.

The numbers are compared with the installed TRL's own. CI has one version; ``scripts/check_trl_versions.sh 0.24.0
1.9.2`` runs this file with others.
"""

from __future__ import annotations

import inspect
import math
import warnings
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
import trl.trainer.utils as utils
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fused_po.trainers import trl as hooks
from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.loading import load_tokenizer
from fused_po.trainers.trl import hook, older

VERSION = tuple(int(part) for part in version("trl").split(".")[:2])
BEFORE = VERSION < (1, 15)
STEPS = 5
PAIRS = [
    {"prompt": f"say {i} ", "chosen": "yes " * (i % 4 + 1), "rejected": "no never " * (i % 3 + 1)} for i in range(20)
]
TOKENIZER = load_tokenizer("tiny", [text for row in PAIRS for text in row.values()])
TOKENIZER.padding_side = "left"
TOKENIZER.model_input_names = ["input_ids", "attention_mask"]
TIMES = ("runtime", "per_second", "step_time", "total_flos", "time/")
TRAINERS = {
    "dpo": "DPO",
    "kto": "KTO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "sft": "SFT",
    "cpo": "CPO",
    "orpo": "ORPO",
    "online_dpo": "OnlineDPO",
}
PREFERENCES = ("dpo", "cpo", "orpo")


def place(kind: str) -> ModuleType:
    """The module of a trainer, where this version has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (f"trl.trainer.{kind}_trainer", f"trl.experimental.{kind}"):
            try:
                module = import_module(name)
            except ImportError:
                continue
            trainer = getattr(module, f"{TRAINERS[kind]}Trainer", None)
            if trainer is not None:
                return module
    pytest.skip(f"TRL {version('trl')} has no {kind}")


def classes(kind: str) -> tuple[type, type]:
    module, name = place(kind), TRAINERS[kind]
    config = getattr(module, f"{name}Config", None)
    if config is None:
        config = getattr(import_module(module.__name__.replace("_trainer", "_config")), f"{name}Config")
    return getattr(module, f"{name}Trainer"), config


def tiny(seed: int = 0, gemma: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None}
    if gemma:
        config = Gemma2Config(vocab_size=len(TOKENIZER), num_key_value_heads=2, head_dim=16, **sizes, **tokens)
        config.final_logit_softcapping = 3.0
        return Gemma2ForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **sizes, **tokens))


def perturbed(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [math.sin(sum(map(ord, text))) for text in completions]


def run(kind: str, folder: Any, enable: bool, *, lora: bool = False, gemma: bool = False, **settings: Any):
    trainer, config = classes(kind)
    model = tiny(gemma=gemma)
    wanted: dict[str, Any] = {
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "seed": 3,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "max_prompt_length": 32,
        "remove_unused_columns": False if kind in PREFERENCES and kind != "dpo" else None,
        **settings,
    }
    given: dict[str, Any] = {"processing_class": TOKENIZER}
    if kind in PREFERENCES:
        rows = PAIRS
    elif kind == "kto":
        rows = [
            {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
            for r in PAIRS
            for side in ("chosen", "rejected")
        ]
    elif kind == "sft":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
    else:
        rows = [{"prompt": r["prompt"]} for r in PAIRS]
        given["reward_funcs"] = rewards
        if kind == "online_dpo":
            wanted |= {"max_new_tokens": 8, "max_length": 64, "missing_eos_penalty": None}
        else:
            wanted |= {"num_generations": 4, "max_completion_length": 8, "num_iterations": 2, "temperature": 0.9}
            if settings.get("beta"):
                # its reference is read from where the policy is
                model.save_pretrained(folder / "policy")
                model.config._name_or_path = str(folder / "policy")
                perturbed(model)
    if kind in ("dpo", "kto", "online_dpo") and not lora:
        given["ref_model"] = perturbed(tiny(gemma=gemma))
    if lora:
        given["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    known = inspect.signature(config.__init__).parameters
    arguments = {name: value for name, value in wanted.items() if name in known and value is not None}
    torch.manual_seed(1)
    counted = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(
            model=model,
            args=config(output_dir=str(folder), **arguments),
            train_dataset=Dataset.from_list(rows),
            **given,
        )
        if enable:
            with hooks.enable():
                made.train()
                counted = hooks.calls()
        else:
            made.train()
    return [entry for entry in made.state.log_history if "loss" in entry], counted


def compare(kind: str, folder: Any, **settings: Any) -> None:
    theirs, _ = run(kind, folder / "theirs", False, **settings)
    ours, calls = run(kind, folder / "ours", True, **settings)
    assert calls >= STEPS
    assert len(ours) == len(theirs) == STEPS
    assert sum(entry["grad_norm"] > 1e-4 for entry in theirs) >= 3
    for step, (mine, want) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == want.keys()
        for name, value in want.items():
            if any(word in name for word in TIMES) or not isinstance(value, (int, float)):
                continue
            bound = 1e-4 * value + 1e-8 if name == "grad_norm" else 1e-4 * abs(value) + 1e-5
            bound = 1e-5 * max(1.0, abs(value)) if name == "loss" else bound
            same_nan = math.isnan(value) and math.isnan(mine[name])
            assert same_nan or abs(mine[name] - value) <= bound, f"step {step}: {name} {mine[name]}, TRL {value}"


@pytest.fixture(autouse=True)
def _restored():
    before = {name: getattr(utils, name, None) for name in older._FUNCTIONS}
    yield
    hooks.disable()
    assert {name: getattr(utils, name, None) for name in older._FUNCTIONS} == before


ANY = [
    ("cpo", {"loss_type": "sigmoid"}),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    ("cpo", {"loss_type": "ipo"}),
    ("cpo", {"loss_type": "hinge", "lora": True}),
    ("orpo", {}),
    ("orpo", {"gemma": True}),
    ("online_dpo", {}),
    ("online_dpo", {"loss_type": "ipo"}),
]
OLD = [
    ("dpo", {}),
    ("dpo", {"loss_type": "ipo"}),
    ("dpo", {"loss_type": "apo_zero"}),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}),
    ("dpo", {"use_weighting": True}),
    ("dpo", {"ld_alpha": 0.5}),
    ("dpo", {"precompute_ref_log_probs": True}),
    ("dpo", {"gradient_accumulation_steps": 2}),
    ("dpo", {"lora": True}),
    ("dpo", {"gemma": True}),
    ("kto", {}),
    ("kto", {"loss_type": "apo_zero_unpaired"}),
    *(("grpo", {"loss_type": name}) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")),
    ("grpo", {"importance_sampling_level": "sequence"}),
    ("grpo", {"top_entropy_quantile": 0.5}),
    ("grpo", {"gemma": True}),
    ("grpo", {"beta": 0.04}),
    ("rloo", {"beta": 0.0}),
    ("rloo", {"beta": 0.05}),
    ("sft", {}),
    ("sft", {"loss_type": "nll"}),
    ("sft", {"gradient_accumulation_steps": 2}),
    ("sft", {"gemma": True}),
]


def named(cases: list) -> list:
    return [pytest.param(kind, settings, id="-".join([kind, *map(str, settings.values())])) for kind, settings in cases]


@pytest.mark.parametrize(("kind", "settings"), named(ANY))
def test_experimental(kind, settings, tmp_path):
    compare(kind, tmp_path, **settings)


if BEFORE:

    @pytest.mark.parametrize(("kind", "settings"), named(OLD))
    def test_before_1_15(kind, settings, tmp_path):
        known = inspect.signature(classes(kind)[1].__init__).parameters
        missing = settings.keys() - known - {"lora", "gemma"}
        loss_type = settings.get("loss_type")
        if kind == "grpo" and loss_type and f'"{loss_type}"' not in inspect.getsource(place(kind)):
            missing.add(loss_type)
        if missing:
            pytest.skip(f"TRL {version('trl')} has no {', '.join(missing)}")
        compare(kind, tmp_path, **settings)

    def test_metrics_of_sft_get_logits(tmp_path):
        def measure(predictions: Any) -> dict[str, float]:
            return {"mean": float(predictions.predictions.mean())}

        trainer, config = classes("sft")
        rows = Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS[:4]])
        quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
        if "loss_type" in inspect.signature(config.__init__).parameters:
            # the default of later versions has no logits at all
            quiet["loss_type"] = "nll"
        made = trainer(
            model=tiny(),
            args=config(output_dir=str(tmp_path), **quiet),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=TOKENIZER,
            compute_metrics=measure,
        )
        want = made.evaluate()
        with hooks.enable():
            got = made.evaluate()
            assert hooks.calls() > 0
        assert got["eval_mean"] == pytest.approx(want["eval_mean"], rel=1e-5)


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_no_logits_are_made_for_the_loss(kind, tmp_path, monkeypatch):
    """With the whole head in one tile of the log, logits are nowhere made with a graph."""
    made = []
    original = DeferredLogits.made
    monkeypatch.setattr(DeferredLogits, "made", lambda self: made.append(self) or original(self))
    run(kind, tmp_path, True)
    assert made == []


def test_a_wrong_gradient_is_noticed(monkeypatch, tmp_path):
    from fused_po.trainers import deferred

    original = deferred.linear_token_stats

    def scaled(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return type(found)(**(found.present() | {"logp": 1.001 * found.logp - 0.001 * found.logp.detach()}))

    monkeypatch.setattr(deferred, "linear_token_stats", scaled)
    with pytest.raises(AssertionError, match="step 0: grad_norm"):
        compare("orpo", tmp_path)


def test_methods_and_functions_are_put_back():
    trainer = classes("cpo")[0]
    before = vars(trainer)["concatenated_forward"]
    function = utils.selective_log_softmax
    with hooks.enable():
        assert vars(trainer)["concatenated_forward"] is not before
        assert utils.selective_log_softmax is not function
        with hooks.enable(scratch_bytes=1 << 20):
            pass
        assert hooks.is_enabled()
        assert vars(trainer)["concatenated_forward"].__wrapped__ is before
    assert vars(trainer)["concatenated_forward"] is before
    assert utils.selective_log_softmax is function


def test_a_version_that_is_too_old_is_left_alone(monkeypatch):
    monkeypatch.setattr(hook, "version", lambda name: "0.23.1")
    function = utils.selective_log_softmax
    with pytest.raises(ImportError, match=r"TRL 0.23.1 is not supported: 0.24 or later is wanted; nothing was changed"):
        hooks.enable()
    assert utils.selective_log_softmax is function and not hooks.is_enabled()


def test_without_the_functions_nothing_is_changed(monkeypatch):
    monkeypatch.delattr(utils, "selective_log_softmax")
    with pytest.raises(ImportError, match="nothing was changed"):
        hooks.enable()
    monkeypatch.undo()
    assert not hooks.is_enabled()
