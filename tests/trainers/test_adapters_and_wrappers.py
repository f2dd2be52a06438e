"""What stands around a model, and what PEFT puts into it: log-probs and gradients are those of its own logits."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po import linear_token_stats, take_apart
from fused_po.trainers.model import token_stats_of

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
V = 60
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def tiny(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=4, **SIZES, **settings)).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def batch() -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(4, V, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 1:]


def own(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    logits = model(**inputs).logits[:, -labels.shape[1] - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def same(model: nn.Module, inputs: dict[str, Any], labels: Tensor, plain: nn.Module | None = None) -> None:
    """Log-probs, and gradients of a weighted sum of them, as from a model's own logits, by default from the same."""
    weights = torch.linspace(-1.0, 1.0, labels.numel(), dtype=torch.float64).view(labels.shape)

    def gradients(of: nn.Module, logp: Tensor) -> list[Tensor | None]:
        of.zero_grad()
        (weights * logp).sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in of.parameters()]

    plain = model if plain is None else plain
    want = own(plain, inputs, labels)
    expected = gradients(plain, want)
    hidden, head, _ = take_apart(model, **inputs)
    found = linear_token_stats(hidden[:, -labels.shape[1] - 1 : -1], head.weight, labels, **head.options).logp
    torch.testing.assert_close(found.double(), want, rtol=1e-9, atol=1e-9)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected)
    for mine, wanted in zip(gradients(model, found), expected, strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None:
            # norms and rotations are computed in float32
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-8)


def perturbed(model: Any) -> Any:
    """An adapter that is heard, in float64."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


CAUSAL = {"task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=PROJECTIONS, **CAUSAL),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=PROJECTIONS, use_dora=True, **CAUSAL),
    "alora": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 8], **CAUSAL
    ),
    "ia3": lambda: peft.IA3Config(target_modules=PROJECTIONS, feedforward_modules=["down_proj"], **CAUSAL),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=PROJECTIONS, **CAUSAL),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 6, 9], **CAUSAL),
    "a copy of the head": lambda: peft.LoraConfig(
        r=2, target_modules=PROJECTIONS, modules_to_save=["lm_head"], **CAUSAL
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name):
    torch.manual_seed(3)
    base = tiny()
    model = perturbed(peft.get_peft_model(base, ADAPTERS[name]()))
    inputs, labels = batch()
    inputs["input_ids"][:, 3:5] = torch.tensor([7, 8])
    with torch.no_grad():
        assert not torch.allclose(own(model, inputs, labels), own(tiny(), inputs, labels))
    same(model, inputs, labels)


def test_adapters_by_name():
    """Rows of one batch under different adapters, by a hook in PEFT's own forward."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny(), ADAPTERS["lora"](), adapter_name="one")
    model.add_adapter("two", ADAPTERS["lora"]())
    for name in ("one", "two"):
        model.set_adapter(name)
        perturbed(model)
    inputs, labels = batch()
    with torch.no_grad():
        want = own(model, inputs | {"adapter_names": ["one", "two"]}, labels)
        found = token_stats_of(model, inputs | {"adapter_names": ["one", "two"]}, labels).logp
        other = token_stats_of(model, inputs | {"adapter_names": ["two", "__base__"]}, labels).logp
    torch.testing.assert_close(found, want)
    assert not torch.allclose(found[0], other[0]) and not torch.allclose(found[1], other[1])


def test_x_lora(tmp_path):
    """Two passes over the model in one call: the first only finds how much of each adapter there is to be."""
    torch.manual_seed(3)
    paths = {}
    for name in ("0", "1"):
        saved = peft.get_peft_model(tiny(), ADAPTERS["lora"]())
        perturbed(saved).save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
    base = tiny()
    base.config.use_cache = False
    config = peft.XLoraConfig(hidden_size=32, xlora_depth=1, adapters=paths, **CAUSAL)
    model = peft.get_peft_model(base, config).double().eval()
    inputs, labels = batch()
    with torch.no_grad():
        want = own(model, inputs, labels)
        assert not torch.allclose(want, own(tiny(), inputs, labels))
        torch.testing.assert_close(token_stats_of(model, inputs, labels).logp, want)


def test_hooks_of_accelerate():
    model = tiny()
    plain = copy.deepcopy(model)
    for module in (model, model.lm_head, model.model.layers[0]):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    assert "forward" in vars(model.lm_head)
    same(model, *batch(), plain=plain)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    inputs, labels = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            token_stats_of(model, inputs, labels).logp.float(), own(model, inputs, labels).float(), rtol=0.05, atol=0.2
        )


@pytest.mark.parametrize("what", ["whole", "of the model", "body", "head"])
def test_compiled_models(what):
    model = tiny()
    plain = copy.deepcopy(model)
    compiled: Any = model
    if what == "whole":
        compiled = torch.compile(model, backend="aot_eager")
    elif what == "of the model":
        model.compile(backend="aot_eager")
    elif what == "body":
        model.model = torch.compile(model.model, backend="aot_eager")
    else:
        model.lm_head.compile(backend="aot_eager")
    same(compiled, *batch(), plain=plain)
    # and then without the seam
    inputs, _ = batch()
    assert type(compiled(**inputs).logits) is Tensor


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers(reentrant):
    model = tiny()
    plain = copy.deepcopy(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same(model, *batch(), plain=plain)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_body_of_few_bits(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 64}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=4, **sizes))
    for module in [*base.model.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, nn.Linear):
                kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
                options = {"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}
                made = kind(layer.in_features, layer.out_features, bias=False, **options)
                values = bnb.nn.Params4bit if bits == 4 else bnb.nn.Int8Params
                made.weight = values(layer.weight.data.clone(), requires_grad=False, **options)
                setattr(module, name, made.to("cpu"))
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **CAUSAL)
    model = peft.get_peft_model(base, lora)
    inputs, labels = batch()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden, head, _ = take_apart(model, **inputs)
    found = linear_token_stats(hidden[:, :-1], head.weight, labels, **head.options).logp
    want = own(model, inputs, labels)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), trained) for value in (found, want)]
    for mine, truth in zip(*gradients, strict=True):
        assert truth.abs().max() > 0 and (mine - truth).abs().max() <= 1e-5 * truth.abs().max()
