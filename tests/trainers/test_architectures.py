"""Every causal architecture of transformers beside its own logits, plain and with an adapter."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_po.trainers.model import token_stats_of
from tests.trainers.architectures import NAMES, adapted, build, inputs_of, logits_of

# a scale, a cap, both, tied and not, a bias, a head of several layers, a state instead of attention, experts, images
SHORT = ("bert", "cohere", "falcon_h1", "gemma2", "gpt2", "granite", "inkling2_text", "llama4_text", "mamba", "mixtral")
SHORT += ("opt", "prophetnet", "recurrent_gemma", "xlstm")
GRADIENTS = ("llama", "llama4_text", "recurrent_gemma", "mixtral", "gemma2", "gemma3_text", "cohere", "granite", "gpt2")
GRADIENTS += (
    "opt",
    "bloom",
    "falcon",
    "mamba",
    "rwkv",
    "phi",
    "qwen3_moe",
    "nemotron",
    "stablelm",
    "bert",
    "olmo2",
)


def built(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return build(name)
        except Exception as error:
            pytest.skip(f"no small {name}: {type(error).__name__}: {str(error)[:100]}")


def own_log_probs(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, float]:
    logits = logits_of(model, **inputs)
    logp = logits[:, :-1].double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return logp, logits.abs().max().item()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.nightly) for name in NAMES]
)
@pytest.mark.parametrize("way", ["plain", "lora"])
def test_log_probs_are_those_of_the_models_own_logits(name, way):
    model = built(name)
    inputs = inputs_of(model)
    labels = inputs["input_ids"][:, 1:]
    with torch.no_grad():
        plain, _ = own_log_probs(model, inputs, labels)
        if way == "lora":
            try:
                model = adapted(model)
            except ValueError as error:
                pytest.skip(f"PEFT takes no {name}: {str(error)[:100]}")
        want, largest = own_log_probs(model, inputs, labels)
        assert largest > 5 and torch.equal(plain, want) == (way == "plain")
    found = token_stats_of(model, inputs, labels).logp.double()
    # some roundings of a logit in float32
    assert (found - want).abs().max().item() <= 16 * torch.finfo(torch.float32).eps * largest


@pytest.mark.nightly
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_through_the_models_own_logits(name):
    model: Any = built(name).double()
    if hasattr(model, "set_experts_implementation"):
        # the other takes no float64
        model.set_experts_implementation("eager")
    inputs = inputs_of(model)
    labels = inputs["input_ids"][:, 1:]
    weights = torch.linspace(-1.0, 1.0, labels.numel(), dtype=torch.float64).view(labels.shape)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own, _ = own_log_probs(model, inputs, labels)
    rounded = logits_of(model, **inputs).dtype != torch.float64
    want = torch.autograd.grad((weights * own).sum(), parameters, allow_unused=True)
    logp = token_stats_of(model, inputs, labels).logp
    found = torch.autograd.grad((weights * logp).sum(), parameters, allow_unused=True)
    scale = max(gradient.abs().max() for gradient in want if gradient is not None)
    for mine, truth in zip(found, want, strict=True):
        assert (mine is None) == (truth is None)
        if mine is not None:
            # some models round their own logits to float32
            assert (mine - truth).abs().max() <= (1e-6 if rounded else 1e-12) * scale
