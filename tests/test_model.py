"""Hidden states and head of real model classes: their product is the model's own logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
)

from fused_po.trainers.model import hidden_and_head

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


@pytest.mark.parametrize(
    "config", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_an_adapter_on_the_head_is_refused(config):
    model = get_peft_model(make("llama"), LoraConfig(r=2, **config))
    with pytest.raises(ValueError, match="the head carries an adapter"):
        hidden_and_head(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        hidden_and_head(LlamaModel(CONFIGS["llama"]))
