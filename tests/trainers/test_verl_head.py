"""verl's fused log-probs: the functions against full logits, and what ``enable`` and ``disable`` replace."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fused_po.trainers import verl
from tests.forked import on_ranks
from tests.test_distributed import RANKS
from tests.test_model_vision import qwen2_vl
from tests.trainers.verl_modules import DENSE, KERNEL, MEGATRON, PATCH, TORCH, installed

B, S, H, V = 2, 6, 16, 39
assert V % RANKS == 0
SMALL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL)),
    "gemma2, softcap": (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
    "cohere, logit_scale": (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25)),
}


@pytest.fixture(autouse=True)
def _disabled():
    yield
    verl.disable()


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, S, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (B, S))


def truth(logits, labels):
    """Log-probs and entropies by the textbook, in the shape of labels."""
    everything = logits.log_softmax(-1)
    logp = everything.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    entropy = -(everything.exp() * everything).sum(-1)
    return torch.where(labels < 0, 0.0, logp), torch.where(labels < 0, 0.0, entropy)


def tiny(name):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = kind(config).double().eval()
    with torch.no_grad():
        # random heads of width 0.02 would not reach a softcap
        model.lm_head.weight.mul_(40)
    return model


def agree(found, wanted, leaves):
    """Values and the gradients of a sum with other weights for each token, in float64."""
    upstream = [torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value) for value in wanted]
    gradients = []
    for values in (found, wanted):
        for value, want in zip(values, wanted, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-11, atol=1e-11)
        total = sum((value * weight).sum() for value, weight in zip(values, upstream, strict=True))
        gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))
    assert any(gradient is not None for gradient in gradients[0])
    for mine, want in zip(*gradients, strict=True):
        assert (mine is None) == (want is None)
        if mine is not None:
            torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_linear_cross_entropy(dtype, temperature):
    hidden, weight, labels = tensors()
    found = verl.linear_cross_entropy(hidden, weight, labels.to(dtype), temperature)
    wanted = truth(hidden.reshape(-1, H) @ weight.t() / temperature, labels.reshape(-1))
    assert found[0].shape == (B * S,)
    agree(found, wanted, (hidden, weight))


@pytest.mark.parametrize("shape", ["token", "one"])
def test_linear_cross_entropy_with_a_tensor_of_temperatures(shape):
    hidden, weight, labels = tensors()
    temperature = torch.rand(B, S, dtype=torch.float64) + 0.5 if shape == "token" else torch.tensor(0.7).double()
    found = verl.linear_cross_entropy(hidden, weight, labels, temperature)
    logits = (hidden @ weight.t()) / temperature.expand(B, S)[..., None]
    agree(found, truth(logits.reshape(-1, V), labels.reshape(-1)), (hidden, weight))


@pytest.mark.parametrize("reduction", ["sum", "MEAN"])
def test_linear_cross_entropy_reduces_log_probs_alone(reduction):
    hidden, weight, labels = tensors()
    found = verl.linear_cross_entropy(hidden, weight, labels, 1.0, reduction)
    logp, entropy = truth(hidden.reshape(-1, H) @ weight.t(), labels.reshape(-1))
    agree(found, (logp.sum() if reduction == "sum" else logp.mean(), entropy), (hidden, weight))


def test_linear_cross_entropy_refuses_what_it_can_not_do():
    hidden, weight, labels = tensors()
    whole = verl.linear_cross_entropy(hidden, weight, labels, 1.0, "none", SimpleNamespace(size=lambda: 1))
    assert torch.equal(whole[0], verl.linear_cross_entropy(hidden, weight, labels)[0])
    with pytest.raises(ValueError, match="one of none, sum, mean: got 'max'"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "max")
    with pytest.raises(ValueError, match="labels"):
        verl.linear_cross_entropy(hidden, weight, labels[:, 1:])


def tensor_parallel_on_rank(rank):
    """Megatron's shapes: a shard of the head, hidden states that were gathered, gradients that are summed up."""
    hidden, weight, labels = tensors()
    upstream = torch.linspace(-1, 1, B * S, dtype=torch.float64)

    def total(logp, entropy):
        return (upstream * logp).sum() + (upstream.flip(0) * entropy).sum()

    flat = labels.reshape(-1)
    whole = truth(hidden.reshape(-1, H) @ weight.t() / 0.7, flat)
    dh, dw = torch.autograd.grad(total(*whole), (hidden, weight))
    rows = V // RANKS
    mine = weight.detach()[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    found = verl.linear_cross_entropy(hidden, mine, labels, 0.7, "none", dist.group.WORLD)
    for value, want in zip(found, whole, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-11, atol=1e-12)
    partial, shard = torch.autograd.grad(total(*found), (hidden, mine))
    dist.all_reduce(partial)
    torch.testing.assert_close(partial, dh, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(shard, dw[rank * rows : (rank + 1) * rows], rtol=1e-10, atol=1e-12)


def test_a_head_sharded_over_ranks(tmp_path):
    on_ranks(tensor_parallel_on_rank, RANKS, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_fused_linear_for_ppo(packed):
    hidden, weight, labels = tensors()
    labels[0, 2] = -100
    given = (hidden.reshape(-1, H), weight, labels.reshape(-1)) if packed else (hidden, weight, labels)
    found = verl.FusedLinearForPPO(chunk_size=4, impl_backend="liger")(*given, temperature=0.6)
    assert found[0].shape == found[1].shape == given[2].shape
    agree(found, truth(given[0] @ weight.t() / 0.6, given[2]), (hidden, weight))


def test_an_entropy_of_bfloat16_is_float32():
    hidden, weight, labels = tensors(torch.bfloat16)
    logp, entropy = verl.FusedLinearForPPO()(hidden, weight, labels)
    assert logp.dtype == entropy.dtype == torch.float32
    wanted = truth(hidden.double() @ weight.double().t(), labels)
    torch.testing.assert_close(entropy.double(), wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", ["input_ids", "labels", "shift_labels"])
@pytest.mark.parametrize("name", MODELS)
def test_forward(name, labels):
    model = tiny(name)
    ids, other = torch.randint(3, V, (B, S)), torch.randint(3, V, (B, S))
    mask = torch.ones_like(ids)
    given = {} if labels == "input_ids" else {labels: other}
    out = verl.forward_with_fused_po(
        model, input_ids=ids, attention_mask=mask, temperature=0.7, use_cache=False, return_dict=True, **given
    )
    targets = {"input_ids": ids.roll(-1, -1), "labels": other.roll(-1, -1), "shift_labels": other}[labels]
    logits = model(input_ids=ids, attention_mask=mask).logits
    parameters = [p for p in model.parameters() if p.requires_grad]
    agree((out.log_probs, out.entropy), truth(logits / 0.7, targets), parameters)
    assert out.logits is None


def test_forward_with_a_bias_and_what_else_the_model_returns():
    model = tiny("llama")
    model.lm_head = nn.Linear(H, V).double()
    ids = torch.randint(3, V, (B, S))
    out = verl.forward_with_fused_po(model, input_ids=ids, output_hidden_states=True, use_cache=True)
    wanted = truth(model(input_ids=ids).logits, ids.roll(-1, -1))
    agree((out.log_probs, out.entropy), wanted, list(model.parameters()))
    assert len(out.hidden_states) == 2 and out.past_key_values is not None
    for refused, given in (("return_dict=False", {"input_ids": ids, "return_dict": False}), ("is needed", {})):
        with pytest.raises(ValueError, match=refused):
            verl.forward_with_fused_po(model, **given)


def test_forward_passes_images_on():
    torch.manual_seed(0)
    model, inputs = qwen2_vl()
    model = model.double().eval()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    out = verl.forward_with_fused_po(model, **inputs, temperature=0.7, use_cache=False, return_dict=True)
    wanted = truth(model(**inputs).logits / 0.7, inputs["input_ids"].roll(-1, -1))
    agree((out.log_probs, out.entropy), wanted, list(model.parameters()))


def test_enable_and_disable():
    with installed() as modules:
        kernel, torch_path, dense, megatron = (modules[name] for name in (KERNEL, TORCH, DENSE, MEGATRON))
        before = (
            kernel.linear_cross_entropy,
            torch_path.FusedLinearForPPO,
            dense.forward_with_torch_backend,
            dense.forward_with_triton_backend,
            megatron.linear_cross_entropy,
        )

        def now():
            return (
                kernel.linear_cross_entropy,
                torch_path.FusedLinearForPPO,
                dense.forward_with_torch_backend,
                dense.forward_with_triton_backend,
                megatron.linear_cross_entropy,
            )

        assert not verl.is_enabled() and verl.calls() == 0
        verl.enable()
        enabled = now()
        assert verl.is_enabled() and all(ours is not theirs for ours, theirs in zip(enabled, before, strict=True))
        verl.enable(scratch_bytes=1 << 20)
        assert all(again is not first for again, first in zip(now(), enabled, strict=True))
        assert torch_path.FusedLinearForPPO().options["scratch_bytes"] == 1 << 20
        verl.disable()
        verl.disable()
        assert now() == before and not verl.is_enabled()
        with pytest.raises(KeyError), verl.enable():
            raise KeyError
        assert now() == before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_the_forward_that_verl_puts_in_place_is_ours(path, name):
    """It takes softcap and logit scale into account; verl's own doesn't."""
    model = tiny(name)
    ids = torch.randint(3, V, (1, S))
    wanted = truth(model(input_ids=ids).logits / 0.7, ids.roll(-1, -1))
    with installed() as modules, verl.enable(scratch_bytes=1 << 16):
        forward = getattr(modules[DENSE], f"forward_with_{path}_backend")
        out = forward(model, input_ids=ids, attention_mask=torch.ones_like(ids), temperature=0.7, return_dict=True)
        assert verl.calls() == 1
    agree((out.log_probs, out.entropy), wanted, list(model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_a_class_whose_forward_verl_replaces_runs_its_own(name):
    model = tiny(name)
    model.__class__ = type(model.__class__.__name__, (model.__class__,), {"forward": model.__class__.forward})
    ids = torch.randint(3, V, (B, S))
    wanted = truth(model(input_ids=ids).logits / 0.7, ids.roll(-1, -1))
    with installed() as modules, verl.enable():
        modules[PATCH].patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="triton")
        for _ in range(2):
            out = model(input_ids=ids, temperature=0.7)
        assert verl.calls() == 2
    agree((out.log_probs, out.entropy), wanted, list(model.parameters()))


def test_a_forward_that_is_lost():
    kind = type(
        "Lost", (nn.Module,), {"forward": verl.forward_with_fused_po, "get_output_embeddings": lambda self: None}
    )
    with pytest.raises(ValueError, match="the forward of Lost is lost: note_forward"):
        kind()(input_ids=torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_a_model_that_has_verls_forward_already_takes_ours(path):
    model = tiny("llama")
    ids = torch.randint(3, V, (1, S))
    wanted = truth(model(input_ids=ids).logits / 0.7, ids.roll(-1, -1))
    with installed() as modules:
        forward = getattr(modules[DENSE], f"forward_with_{path}_backend")
        with verl.enable():
            found = forward(model, input_ids=ids, temperature=0.7)
            assert verl.calls() == 1
        agree([value.view(1, S) for value in found], wanted, list(model.parameters()))
        assert forward(model, input_ids=ids) == ("verl's log-probs", "verl's entropy")


def test_megatron_which_imported_the_name_takes_ours_with_a_whole_head():
    hidden, weight, labels = tensors()
    group = SimpleNamespace(size=lambda: 1)
    with installed() as modules, verl.enable():
        found = modules[MEGATRON].fused_output_processor(hidden, weight, labels, 1.0, group)
    agree(found, truth(hidden.reshape(-1, H) @ weight.t(), labels.reshape(-1)), (hidden, weight))


@pytest.mark.parametrize("missing", [KERNEL, TORCH])
def test_another_verl_is_refused_and_left_alone(missing):
    with installed(without=(missing, MEGATRON)) as modules:
        before = {name: dict(module.__dict__) for name, module in modules.items()}
        with pytest.raises(ImportError, match=f"this verl is not supported, it has no {missing}"):
            verl.enable()
        after = {name: dict(module.__dict__) for name, module in modules.items()}
        for name in before:
            ours = {key: value for key, value in before[name].items() if not key.startswith("__")}
            assert {key: after[name][key] for key in ours} == ours
        assert not verl.is_enabled()


def test_a_verl_without_the_dense_forward_is_fine():
    with installed(without=(DENSE,)) as modules, verl.enable():
        assert modules[KERNEL].linear_cross_entropy.__wrapped__ is verl.linear_cross_entropy


def test_without_verl_one_sentence_says_so():
    code = (
        "import sys, importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'verl' else found(name, *a)\n"
        "from fused_po.trainers import verl\n"
        "assert 'verl' not in sys.modules\n"
        "for call in (verl.enable, verl.register_policy_losses):\n"
        "    try:\n        call()\n    except ImportError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "fused_po.trainers.verl.enable() needs verl, which is not installed: pip install verl",
        "fused_po.trainers.verl.register_policy_losses() needs verl, which is not installed: pip install verl",
    ]
