"""Which heads can hand on deferred logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.seam import deferred, output_layer

IDS = torch.arange(8).view(2, 4)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


def test_it_is_that_of_the_outermost_model_that_names_one():
    model = tiny()
    assert output_layer(nn.ModuleDict({"inner": nn.Sequential(model)})) == (model, model.lm_head)
    with pytest.raises(ValueError, match="Linear has no output layer"):
        output_layer(nn.Linear(2, 2))


@pytest.mark.parametrize("odd", ["hook", "forward of its own", "compiled", "nothing"])
def test_heads_that_wait(odd):
    """Whatever stands around the product is called as ever."""
    model: Any = tiny()
    layer, seen = model.lm_head, []
    if odd == "hook":
        layer.register_forward_pre_hook(lambda _, args: (2.0 * args[0],))
        layer.register_forward_hook(lambda _, args, logits: seen.append(logits) or logits / 2.0)
    elif odd == "forward of its own":
        own = layer.forward
        layer.forward = lambda hidden: seen.append(hidden) or own(3.0 * hidden)
    elif odd == "compiled":
        layer.compile(backend="eager")
    want = model(IDS).logits
    before = dict(vars(layer))
    seen.clear()
    with deferred(model) as calls, deferred(model):
        found = model(IDS).logits
    assert isinstance(found, DeferredLogits) and found.now is None
    torch.testing.assert_close(found.made(), want)
    assert vars(layer) == before and len(calls) == 1 and len(seen) == (odd in ("hook", "forward of its own"))


def test_heads_that_make_their_logits():
    model = tiny()
    with pytest.warns(UserWarning, match="full logits are made: DataParallel"), deferred(nn.DataParallel(model)):
        assert type(model(IDS).logits) is torch.Tensor
    with deferred(nn.Linear(2, 2)) as calls:
        pass
    assert calls == []
