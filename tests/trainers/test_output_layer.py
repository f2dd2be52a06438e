"""Which heads can hand on deferred logits."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po.trainers.logits import output_layer


def tiny() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


@pytest.mark.parametrize("odd", ["hook", "adapter", "sharded", "data parallel"])
def test_heads_that_make_their_logits(odd):
    model: Any = tiny()
    if odd == "hook":
        model.lm_head.register_forward_hook(lambda *_: None)
    elif odd == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    elif odd == "sharded":
        model.lm_head.weight.ds_id = 3
    else:
        model = nn.DataParallel(model)
    assert output_layer(model) is None
    assert output_layer(tiny()) is not None
