"""``llamafactory.enable``: trainers of that shape, since LLaMA-Factory's pins fit into no environment of ours.

``python tests/oracles/compare_llamafactory.py`` takes five steps of its own trainers where it is installed.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po.trainers import deferred, llamafactory
from fused_po.trainers.deferred import DeferredLogits

DPO, KTO = "llamafactory.train.dpo.trainer", "llamafactory.train.kto.trainer"


def log_probs(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens that have a label."""
    found = logits[:, :-1, :].log_softmax(-1).gather(2, labels[:, 1:].clamp_min(0).unsqueeze(2)).squeeze(2)
    return (found * (labels[:, 1:] >= 0)).sum(-1)


class CustomDPOTrainer:
    """What a trainer asks a model and its logits for."""

    def __init__(self, model: nn.Module, ref_model: nn.Module | None = None) -> None:
        self.model, self.ref_model = model, ref_model

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits.to(torch.float32)
        chosen, rejected = logits.split(len(logits) // 2, dim=0)
        return {"logps": log_probs(logits, batch["labels"]), "chosen": chosen, "rejected": rejected}


class CustomKTOTrainer(CustomDPOTrainer):
    def forward(self, model: nn.Module, batch: dict[str, Any], prefix: str = "") -> tuple[Any, torch.Tensor]:
        logits = model(input_ids=batch[f"{prefix}input_ids"]).logits.to(torch.float32)
        return logits, log_probs(logits, batch[f"{prefix}labels"])


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    names = ["llamafactory", "llamafactory.train", "llamafactory.train.dpo", "llamafactory.train.kto", DPO, KTO]
    made = {}
    for name in names:
        made[name] = ModuleType(name)
        made[name].__spec__, made[name].__path__ = ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, made[name])
    made[DPO].CustomDPOTrainer = type("CustomDPOTrainer", (), dict(vars(CustomDPOTrainer)))
    made[KTO].CustomKTOTrainer = type("CustomKTOTrainer", (made[DPO].CustomDPOTrainer,), dict(vars(CustomKTOTrainer)))
    yield SimpleNamespace(dpo=made[DPO], kto=made[KTO])
    llamafactory.disable()


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 31, (4, 7))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(7) < 3, -100)}


def test_dpo_gives_the_same_log_probs_metrics_and_gradients(modules, batch):
    policy = model()
    trainer = modules.dpo.CustomDPOTrainer(policy, model())
    found = []
    for ours in (False, True):
        if ours:
            llamafactory.enable()
        out = trainer.concatenated_forward(policy, dict(batch))
        (out["logps"] * torch.tensor([1.0, 2.0, -1.0, 0.5])).sum().backward()
        assert isinstance(out["chosen"], DeferredLogits) == ours
        numbers = [out["logps"].detach(), out["chosen"].detach().mean(), out["rejected"].detach().mean()]
        found.append((numbers, [p.grad.clone() for p in policy.parameters()]))
        policy.zero_grad()
        with torch.no_grad():
            found[-1][0].append(trainer.concatenated_forward(trainer.ref_model, dict(batch))["logps"])
    assert llamafactory.calls() == 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_kto(modules, batch):
    trainer = modules.kto.CustomKTOTrainer(model())
    want_logits, want = trainer.forward(trainer.model, dict(batch))
    desirable = torch.tensor([True, False, True, True])
    with llamafactory.enable(scratch_bytes=1 << 16):
        logits, logp = trainer.forward(trainer.model, dict(batch))
        torch.testing.assert_close(logp, want, rtol=1e-5, atol=1e-5)
        assert llamafactory.calls() == 1
        torch.testing.assert_close(
            logits[desirable].detach().nansum(), want_logits[desirable].detach().nansum(), rtol=1e-5, atol=1e-4
        )
    assert llamafactory.calls() == 0


def test_a_wrong_gradient_would_be_seen(modules, batch, monkeypatch):
    original = deferred.linear_token_stats

    def scaled(*args, **kwargs):
        found = original(*args, **kwargs)
        return type(found)(**(found.present() | {"logp": 1.01 * found.logp - 0.01 * found.logp.detach()}))

    monkeypatch.setattr(deferred, "linear_token_stats", scaled)
    with pytest.raises(AssertionError, match="not close"):
        test_dpo_gives_the_same_log_probs_metrics_and_gradients(modules, batch)


def test_enable_and_disable(modules):
    before = vars(modules.dpo.CustomDPOTrainer)["concatenated_forward"]
    assert not llamafactory.is_enabled()
    with llamafactory.enable():
        assert llamafactory.is_enabled() and vars(modules.dpo.CustomDPOTrainer)["concatenated_forward"] is not before
        with llamafactory.enable(scratch_bytes=1):
            pass
        assert vars(modules.dpo.CustomDPOTrainer)["concatenated_forward"].__wrapped__ is before
    llamafactory.disable()
    assert vars(modules.dpo.CustomDPOTrainer)["concatenated_forward"] is before


def test_an_unknown_version_is_left_alone(modules):
    before = vars(modules.dpo.CustomDPOTrainer)["concatenated_forward"]
    del modules.kto.CustomKTOTrainer.forward
    with pytest.raises(ImportError, match=r"it has no llamafactory.train.kto.trainer.CustomKTOTrainer.forward"):
        llamafactory.enable()
    assert vars(modules.dpo.CustomDPOTrainer)["concatenated_forward"] is before and not llamafactory.is_enabled()


def test_without_it_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(llamafactory, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs LLaMA-Factory, which is not installed: pip install llamafactory$"):
        llamafactory.enable()
