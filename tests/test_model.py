"""Hidden states and head of real model classes: their product is the model's own logits."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
)

from fused_po import take_apart
from fused_po.trainers.model import hidden_and_head, token_stats_of
from fused_po.trainers.seam import deferred

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2, tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2, softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "cohere, logit_scale": CohereConfig(**SMALL, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "granite, logits_scaling": GraniteConfig(**SMALL, logits_scaling=4.0),
}


def make(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        # random heads of width 0.02 would not reach a softcap
        model.get_output_embeddings().weight.mul_(40)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_model(name):
    model = make(name)
    ids = torch.randint(0, 40, (2, 5))
    backbone, head = hidden_and_head(model)
    torch.testing.assert_close(head.logits(backbone(input_ids=ids)), model(ids).logits)
    assert ("softcap" in name) == (head.softcap is not None)


def test_an_adapter_on_the_backbone_is_heard():
    model = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(0, 40, (2, 5))
    backbone, head = hidden_and_head(model)
    torch.testing.assert_close(head.logits(backbone(input_ids=ids)), model(ids).logits)
    assert not head.weight.requires_grad


def test_the_head_before_and_after_a_run():
    model = make("gemma2, softcap")
    backbone, head = hidden_and_head(model)
    assert head.weight is model.lm_head.weight and head.bias is None
    with pytest.raises(ValueError, match="call the backbone first"):
        _ = head.options
    with torch.no_grad():
        backbone(input_ids=torch.randint(0, 40, (2, 5)))
    # the parameter itself: the run that showed the cap had no graph
    assert head.options == {"bias": None, "softcap": 2.0, "logit_scale": 1.0} and head.weight.requires_grad


def test_what_a_model_returns_beside_logits():
    sizes = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True)).train()
    ids = torch.randint(0, 40, (2, 5))
    hidden, head, outputs = take_apart(model, input_ids=ids)
    want = model(ids)
    torch.testing.assert_close(outputs.aux_loss, want.aux_loss)
    torch.testing.assert_close(head.logits(hidden), want.logits)
    # no graph hangs on what is kept beside them
    assert outputs.aux_loss.requires_grad and outputs.past_key_values is None


@pytest.mark.parametrize("keep", [2, torch.tensor([1, 3])])
def test_logits_of_some_positions(keep):
    model, ids = make("llama"), torch.randint(0, 40, (2, 5))
    hidden, head, _ = take_apart(model, input_ids=ids, logits_to_keep=keep)
    assert hidden.shape == (2, 2, 16)
    torch.testing.assert_close(head.logits(hidden), model(ids, logits_to_keep=keep).logits)


def test_the_loss_of_the_model_itself_needs_no_logits():
    model, ids = make("llama"), torch.randint(0, 40, (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, outputs = take_apart(model, check=False, input_ids=ids, labels=ids)
    torch.testing.assert_close(outputs.loss, model(ids, labels=ids).loss)


class Cut(LlamaForCausalLM):
    """Its head has rows behind the tokens, as some checkpoints are padded."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits[..., :37] / 0.7
        return found


class Clamped(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits.float().clamp(max=1.0)
        return found


class Masked(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits[:, :, 3:5] = torch.finfo(found.logits.dtype).min
        return found


class Twice(LlamaForCausalLM):
    """Asks its head again, for the token after the next."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, output_hidden_states=True, **kwargs)
        found["later"] = self.lm_head(2.0 * found.hidden_states[-1])
        return found


class Sly(LlamaForCausalLM):
    """Does to real logits what it leaves undone here."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        if isinstance(found.logits, torch.Tensor):
            found.logits = found.logits + 1.0 * torch.arange(40)
        return found


def made(kind):
    torch.manual_seed(0)
    return kind(LlamaConfig(**SMALL)).eval(), torch.randint(0, 37, (2, 5))


def test_a_cut_of_the_vocabulary():
    model, ids = made(Cut)
    hidden, head, _ = take_apart(model, input_ids=ids)
    assert head.vocab_size == 37 and head.options["vocab_size"] == 37
    torch.testing.assert_close(head.logits(hidden), model(ids).logits)
    want = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_stats_of(model, {"input_ids": ids}, ids[:, 1:]).logp, want)


def test_a_head_that_is_called_twice():
    model, ids = made(Twice)
    hidden, head, outputs = take_apart(model, input_ids=ids)
    want = model(ids)
    torch.testing.assert_close(head.logits(hidden), want.logits)
    torch.testing.assert_close(outputs["later"].made(), want["later"])
    later = outputs["later"].logp(ids)
    torch.testing.assert_close(later, want["later"].log_softmax(-1).gather(-1, ids[..., None])[..., 0])


@pytest.mark.parametrize(("kind", "name"), [(Clamped, "clamp"), (Masked, "__setitem__")])
def test_what_is_not_followed_makes_logits_with_one_warning(kind, name):
    model, ids = made(kind)
    labels = ids[:, 1:].clone()
    labels[(labels == 3) | (labels == 4)] = -100
    want = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    want = want.where(labels >= 0, torch.zeros(()))
    with pytest.warns(UserWarning) as caught:
        found = token_stats_of(model, {"input_ids": ids}, labels, check=False).logp
    assert len(caught) == 1 and f"{name} of a model's logits is not followed" in str(caught[0].message)
    torch.testing.assert_close(found, want)
    mine, truth = (torch.autograd.grad(value.sum(), list(model.parameters())) for value in (found, want))
    for one, other in zip(mine, truth, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"{kind.__name__} are not .*it does {name} to"):
        take_apart(model, input_ids=ids, check=False)


def test_a_model_is_checked_against_its_own_logits_once():
    model, ids = made(Sly)
    with pytest.raises(ValueError, match="Sly is not a head on its last hidden states: .* check=False"):
        take_apart(model, input_ids=ids)
    assert take_apart(model, input_ids=ids, check=False)[0].shape == (2, 5, 16)
    calls = []
    model, ids = made(LlamaForCausalLM)
    # another order of random numbers would be another model
    model.train().model.layers[0].self_attn.attention_dropout = 0.5
    model.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    torch.manual_seed(5)
    hidden = [take_apart(model, input_ids=ids)[0] for _ in range(2)]
    assert calls == [False, False, True, True] and not torch.equal(*hidden)
    torch.manual_seed(5)
    torch.testing.assert_close(take_apart(model, input_ids=ids)[0], hidden[0])


def test_a_copy_made_within_does_not_keep_the_old_head():
    model, ids = made(LlamaForCausalLM)
    with deferred(model):
        copied = copy.deepcopy(model)
        inside = model(ids).logits
    with torch.no_grad():
        copied.lm_head.weight.mul_(2.0)
    assert type(copied(ids).logits) is torch.Tensor
    torch.testing.assert_close(copied(ids).logits, 2.0 * inside.made())
    hidden, head, _ = take_apart(copied, input_ids=ids)
    torch.testing.assert_close(head.logits(hidden), 2.0 * inside.made())


@pytest.mark.parametrize(
    "config", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_an_adapter_on_the_head(config):
    """A copy of the head is a head; what is added to its logits makes them."""
    model, ids = get_peft_model(make("llama"), LoraConfig(r=2, **config)), torch.randint(0, 40, (2, 5))
    want = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    if "modules_to_save" in config:
        found = token_stats_of(model, {"input_ids": ids}, ids[:, 1:]).logp
        assert take_apart(model, input_ids=ids)[1].weight.requires_grad
    else:
        with pytest.warns(UserWarning, match="__add__ of a model's logits is not followed"):
            found = token_stats_of(model, {"input_ids": ids}, ids[:, 1:]).logp
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="it does __add__ to them"):
            take_apart(model, input_ids=ids)
    torch.testing.assert_close(found, want)


def test_a_model_without_a_head_is_refused():
    for refused in (hidden_and_head, take_apart):
        with pytest.raises(ValueError, match="LlamaModel has no output layer"):
            refused(LlamaModel(CONFIGS["llama"]))
